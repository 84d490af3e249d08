//! Snapshots of whole screens.

use std::time::Duration;

use ratatui::{Terminal, backend::TestBackend};

use super::{
    press,
    scene::{Scene, client_rows},
};
use crate::top::{
    clients::Clients,
    draw::{draw, full_height, page, to_text},
    state::State,
};

/// The text of a terminal of this size.
pub(super) fn frame(state: &mut State, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| {
            state.set_page(page(state, frame.area()));
            draw(state, frame.area(), frame.buffer_mut());
        })
        .unwrap();
    let text = to_text(terminal.backend().buffer());
    assert!(text.lines().all(|line| line.chars().count() <= usize::from(width)));
    text
}

/// The shop, with traffic in its last second.
fn busy_shop() -> (Scene, State) {
    let mut scene = Scene::shop();
    let mut state = scene.state();
    scene.count(1, 0, [3, 40, 0, 0]);
    scene.count(1, 1, [5, 81, 2, 0]);
    scene.count(2, 0, [0, 7, 1, 4]);
    scene.later(&mut state, 2);
    (scene, state)
}

/// The busy shop's front, with its clients.
fn front() -> (Scene, State) {
    let (scene, mut state) = busy_shop();
    press(&mut state, "<enter>");
    scene.answer(&mut state, client_rows(5));
    (scene, state)
}

#[test]
fn no_services() {
    insta::assert_snapshot!(frame(&mut Scene::empty().state(), 80, 24), @r"
    affinity top  0 services  0 pods  0 pins  - connections/s               every 1s
      SERVICE  READY  PINS▾  CONN/S  PINNED/S  MOVED/S  REFUSED/S  HOT SPOT
      no services














    ── events ──────────────────────────────────────────────────────────────────────





    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
}

#[test]
fn services_before_there_are_rates() {
    insta::assert_snapshot!(frame(&mut Scene::shop().state(), 80, 24), @r"
    affinity top  4 services  8 pods  4195 pins  - connections/s            every 1s
      SERVICE          READY  PINS▾  CONN/S  MOVED/S  REFUSED/S  HOT SPOT
    ▸ shop/front         3/3   4170       -        -          -  front-1 1.7x
      shop/cart          1/2     21       -        -          -
      kube-system/dns    2/2      4       -        -          -
      shop/static        1/1      -       -        -          -











    ── events ──────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1
       1m15s ago  moved shop/cart 2001:db8:c::4 -> shop/cart-1 > shop/cart-0 reason…



    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
}

#[test]
fn services_at_80x24() {
    insta::assert_snapshot!(frame(&mut busy_shop().1, 80, 24), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 connections/s         every 1s
      SERVICE          READY  PINS▾  CONN/S  MOVED/S  REFUSED/S  HOT SPOT
    ▸ shop/front         3/3   4170    65.5      1.0          0  front-1 1.7x
      shop/cart          1/2     21     4.0      0.5        2.0
      kube-system/dns    2/2      4       0        0          0
      shop/static        1/1      -       0        0          0











    ── events ──────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1
       1m15s ago  moved shop/cart 2001:db8:c::4 -> shop/cart-1 > shop/cart-0 reason…



    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
}

#[test]
fn services_at_120x40() {
    insta::assert_snapshot!(frame(&mut busy_shop().1, 120, 40), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 connections/s                                                 every 1s
      SERVICE          READY  PINS▾  CONN/S  PINNED/S  MOVED/S  REFUSED/S  HOT SPOT
    ▸ shop/front         3/3   4170    65.5       4.0      1.0          0  front-1 1.7x
      shop/cart          1/2     21     4.0         0      0.5        2.0
      kube-system/dns    2/2      4       0         0        0          0
      shop/static        1/1      -       0         0        0          0























    ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1
       1m15s ago  moved shop/cart 2001:db8:c::4 -> shop/cart-1 > shop/cart-0 reason=not-ready







    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
}

#[test]
fn services_at_40x10() {
    insta::assert_snapshot!(frame(&mut busy_shop().1, 40, 10), @r"
    affinity top  4 services  8 po… every 1s
      SERVICE          PINS▾  CONN/S
    ▸ shop/front        4170    65.5
      shop/cart           21     4.0
      kube-system/dns      4       0
      shop/static          -       0



    ? help  q quit  Enter open  / filter  s…
    ");
}

#[test]
fn a_terminal_that_is_too_small_says_so() {
    insta::assert_snapshot!(frame(&mut busy_shop().1, 20, 5), @"the terminal is too");
}

#[test]
fn many_services_in_another_order_on_their_last_page() {
    let mut state = Scene::many(100).state();
    press(&mut state, "ssssr<end>");
    insta::assert_snapshot!(frame(&mut state, 80, 24), @r"
    affinity top  100 services  200 pods  7550 pins  - connections/s        every 1s
      SERVICE▴        READY  PINS  CONN/S  PINNED/S  MOVED/S  REFUSED/S  HOT SPOT
      team-0/app-070    2/2   105       -         -        -          -
      team-0/app-063    2/2    94       -         -        -          -
      team-0/app-056    2/2    84       -         -        -          -
      team-0/app-049    2/2    73       -         -        -          -
      team-0/app-042    2/2    63       -         -        -          -
      team-0/app-035    2/2    52       -         -        -          -
      team-0/app-028    2/2    42       -         -        -          -
      team-0/app-021    2/2    31       -         -        -          -
      team-0/app-014    2/2    21       -         -        -          -
    ▸ team-0/app-007    2/2    10       -         -        -          -





    ── events ──────────────────────────────────────────────────────────────────────





    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
}

#[test]
fn a_filter_being_typed() {
    let mut state = busy_shop().1;
    press(&mut state, "/shop/c");
    insta::assert_snapshot!(frame(&mut state, 80, 10), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 connections/s         every 1s
      SERVICE    READY  PINS▾  CONN/S  PINNED/S  MOVED/S  REFUSED/S  HOT SPOT
    ▸ shop/cart    1/2     21     4.0         0      0.5        2.0






    /shop/c▁   Enter keeps the filter, Esc clears it
    ");
    press(&mut state, "art-");
    insta::assert_snapshot!(frame(&mut state, 80, 10), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 connections/s         every 1s
      SERVICE  READY  PINS▾  CONN/S  PINNED/S  MOVED/S  REFUSED/S  HOT SPOT
      no service matches `shop/cart-`






    /shop/cart-▁   Enter keeps the filter, Esc clears it
    ");
}

#[test]
fn long_names_keep_both_ends() {
    let mut scene = Scene::empty();
    let pod = "recommendations-with-a-long-name-6d4cf56db6-x7k2p";
    scene.service(
        1,
        "a-namespace-with-a-very-long-name/a-service-that-nobody-can-pronounce",
        &[(pod, 90), ("web-1", 9)],
    );
    let mut state = scene.state();
    insta::assert_snapshot!(frame(&mut state, 60, 8), @r"
    affinity top  1 service  2 pods  99 pins  - connec… every 1s
      SERVICE               READY  PINS▾  CONN/S  HOT SPOT
    ▸ a-namespac…pronounce    2/2     99       -  recomme…p 1.8x




    ? help  q quit  Enter open  / filter  s sort  r reverse  U …
    ");
    press(&mut state, "<enter>");
    insta::assert_snapshot!(frame(&mut state, 60, 12), @r"
    affinity top > a-namespace-with-a-very-long-name/a… every 1s
      ClientIP timer=connection timeout=10800s select=random  1…
      - connections/s  - pinned/s  - moved/s  - refused/s
    ── 2 pods, 50 pins each on average ─────────────────────────
      POD                 CONN/S  PINS▾            HOT SPOT
    ▸ recommend…b6-x7k2p       -     90  ████████  1.8x the mean
      web-1                    -      9  ▊




    ? help  q quit  Esc back  Tab pods/clients  / filter  s sor…
    ");
}

#[test]
fn a_service_with_a_hot_spot_at_80x24() {
    insta::assert_snapshot!(frame(&mut front().1, 80, 24), @r"
    affinity top > shop/front                                               every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.1:80/TCP
      65.5 connections/s  4.0 pinned/s  1.0 moved/s  0 refused/s
    ── 3 pods, 1390 pins each on average ───────────────────────────────────────────
      POD      ADDRESS      STATE  CONN/S  PINS▾                       HOT SPOT
    ▸ front-1  10.244.1.11  ready    44.0   2400  ███████████████████  1.7x the mean
      front-0  10.244.1.10  ready    21.5    900  ███████▏
      front-2  10.244.1.12  ready       0    870  ██████▉
    ── 5 clients ───────────────────────────────────────────────────────────────────
      CLIENT                        POD      AGE    IDLE▾  EXPIRES  REASON
      198.18.0.0                    front-0  10m2s  2s     2h59m    created
      198.18.0.1                    front-1  10m3s  3s     never    backend-gone
      2001:db8:c:200:feed:beef:0:2  front-2  10m4s  4s     expired  operator
      198.18.0.3                    front-0  10m5s  5s     2h59m    created
      198.18.0.4                    front-1  10m6s  6s     never    backend-gone


    ── events ──────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1




    ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause
    ");
}

#[test]
fn a_service_at_120x40() {
    let (_, mut state) = front();
    press(&mut state, "<tab><down>");
    insta::assert_snapshot!(frame(&mut state, 120, 40), @r"
    affinity top > shop/front                                                                                       every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.1:80/TCP
      65.5 connections/s  4.0 pinned/s  1.0 moved/s  0 refused/s
    ── 3 pods, 1390 pins each on average ───────────────────────────────────────────────────────────────────────────────────
      POD      ADDRESS      STATE  CONN/S  PINS▾                                            HOT SPOT
      front-1  10.244.1.11  ready    44.0   2400  ████████████████████████████████████████  1.7x the mean
      front-0  10.244.1.10  ready    21.5    900  ███████████████
      front-2  10.244.1.12  ready       0    870  ██████████████▌
    ── 5 clients ───────────────────────────────────────────────────────────────────────────────────────────────────────────
      CLIENT                        POD      AGE    IDLE▾  EXPIRES  REASON
      198.18.0.0                    front-0  10m2s  2s     2h59m    created
    ▸ 198.18.0.1                    front-1  10m3s  3s     never    backend-gone
      2001:db8:c:200:feed:beef:0:2  front-2  10m4s  4s     expired  operator
      198.18.0.3                    front-0  10m5s  5s     2h59m    created
      198.18.0.4                    front-1  10m6s  6s     never    backend-gone














    ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1








    ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause
    ");
}

#[test]
fn a_service_at_40x10_shows_the_list_with_the_cursor() {
    let (_, mut state) = front();
    insta::assert_snapshot!(frame(&mut state, 40, 10), @r"
    affinity top > shop/front       every 1s
    ── 3 pods, 1390 pins each on average ───
      POD      PINS▾
    ▸ front-1   2400  ██████████████████████
      front-0    900  ████████▎
      front-2    870  ████████



    ? help  q quit  Esc back  Tab pods/clie…
    ");
    press(&mut state, "<tab>");
    insta::assert_snapshot!(frame(&mut state, 40, 10), @r"
    affinity top > shop/front       every 1s
    ── 5 clients ───────────────────────────
      CLIENT           POD      AGE    IDLE▾
    ▸ 198.18.0.0       front-0  10m2s  2s
      198.18.0.1       front-1  10m3s  3s
      2001:db…eef:0:2  front-2  10m4s  4s
      198.18.0.3       front-0  10m5s  5s
      198.18.0.4       front-1  10m6s  6s

    ? help  q quit  Esc back  Tab pods/clie…
    ");
}

#[test]
fn a_service_without_affinity_and_one_with_a_draining_pod() {
    let mut state = busy_shop().1;
    press(&mut state, "/static<enter><enter>");
    insta::assert_snapshot!(frame(&mut state, 80, 15), @r"
    affinity top > shop/static                                              every 1s
      no affinity select=random  10.96.0.3:80/TCP
      0 connections/s  0 pinned/s  0 moved/s  0 refused/s
    ── 1 pod ───────────────────────────────────────────────────────────────────────
      POD       ADDRESS      STATE  CONN/S  PINS▾                           HOT SPOT
    ▸ static-0  10.244.3.10  ready       0      0


    ── no clients: the service has no affinity ─────────────────────────────────────
      CLIENT  POD  AGE  IDLE▾  EXPIRES  REASON




    ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause
    ");
    press(&mut state, "<esc><esc>/cart<enter><enter>");
    insta::assert_snapshot!(frame(&mut state, 80, 15), @r"
    affinity top > shop/cart                                                every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.2:80/TCP
      4.0 connections/s  0 pinned/s  0.5 moved/s  2.0 refused/s
    ── 2 pods, 1 draining, 12 pins each on average ─────────────────────────────────
      POD     ADDRESS      STATE     CONN/S  PINS▾                          HOT SPOT
    ▸ cart-0  10.244.2.10  ready        4.0     12  ██████████████████████
      cart-1  10.244.2.11  draining       0      9  ████████████████▌

    ── clients ─────────────────────────────────────────────────────────────────────
      CLIENT  POD  AGE  IDLE▾  EXPIRES  REASON




    ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause
    ");
}

#[test]
fn more_clients_than_are_listed() {
    let (_, mut state) = front();
    let query = state.query().unwrap();
    state.set_clients(&Clients { query, rows: client_rows(40), matching: 250_000, read: 300_000, complete: true });
    insta::assert_snapshot!(frame(&mut state, 80, 24), @r"
    affinity top > shop/front                                               every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.1:80/TCP
      65.5 connections/s  4.0 pinned/s  1.0 moved/s  0 refused/s
    ── 3 pods, 1390 pins each on average ───────────────────────────────────────────
      POD      ADDRESS      STATE  CONN/S  PINS▾                       HOT SPOT
    ▸ front-1  10.244.1.11  ready    44.0   2400  ███████████████████  1.7x the mean
      front-0  10.244.1.10  ready    21.5    900  ███████▏
      front-2  10.244.1.12  ready       0    870  ██████▉
    ── 250k clients, only 1000 are listed: use / to filter ─────────────────────────
      CLIENT                        POD      AGE    IDLE▾  EXPIRES  REASON
      198.18.0.0                    front-0  10m2s  2s     2h59m    created
      198.18.0.1                    front-1  10m3s  3s     never    backend-gone
      2001:db8:c:200:feed:beef:0:2  front-2  10m4s  4s     expired  operator
      198.18.0.3                    front-0  10m5s  5s     2h59m    created
      198.18.0.4                    front-1  10m6s  6s     never    backend-gone
      2001:db8:c:500:feed:beef:0:5  front-2  10m7s  7s     expired  operator
      198.18.0.6                    front-0  10m8s  8s     2h59m    created
    ── events ──────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1




    ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause
    ");
}

#[test]
fn clients_of_a_pass_that_goes_on() {
    let (_, mut state) = front();
    press(&mut state, "/198<enter>");
    let query = state.query().unwrap();
    state.set_clients(&Clients { query, rows: client_rows(2), matching: 2, read: 131_072, complete: false });
    insta::assert_snapshot!(frame(&mut state, 80, 15), @r"
    affinity top > shop/front                                               every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.1:80/TCP
      65.5 connections/s  4.0 pinned/s  1.0 moved/s  0 refused/s
    ── 3 pods, 1390 pins each on average ───────────────────────────────────────────
      POD      ADDRESS      STATE  CONN/S  PINS▾                       HOT SPOT
      front-1  10.244.1.11  ready    44.0   2400  ███████████████████  1.7x the mean
      front-0  10.244.1.10  ready    21.5    900  ███████▏
      front-2  10.244.1.12  ready       0    870  ██████▉
    ── 2 clients like `198`, 131k sessions read so far ─────────────────────────────
      CLIENT      POD      AGE    IDLE▾  EXPIRES  REASON
    ▸ 198.18.0.0  front-0  10m2s  2s     2h59m    created
      198.18.0.1  front-1  10m3s  3s     never    backend-gone


    filter /198  ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U …
    ");
}

#[test]
fn the_help() {
    let mut state = busy_shop().1;
    press(&mut state, "?");
    insta::assert_snapshot!(frame(&mut state, 80, 24), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 connections/s         every 1s
      SERVICE          READY  PINS▾  CONN/S  MOVED/S  REFUSED/S  HOT SPOT
    ▸ ┌ help ────────────────────────────────────────────────────────────────────┐
      │ arrows, j k   move; also PgUp PgDn Home End                              │
      │ Enter, right  open the service; from a pod, its clients                  │
      │ Esc, left     back; drop the filter                                      │
      │ Tab           from pods to clients, and back                             │
      │ /             filter: names; or clients, pods, reasons                   │
      │ s             sort by the next column                                    │
      │ r             reverse the order                                          │
      │ u             unpin the selected client                                  │
      │ U             unpin all clients of the service                           │
      │ p, space      pause or continue                                          │
      │ ?             this help                                                  │
      │ q, Ctrl-C     quit                                                       │
      │                                                                          │
      │ PINS are live pins by pod; a pod counts in each of its services. A HOT   │
    ──│ SPOT has more than 1.5 times the mean of its service's ready pods, and   │──
      │ exceeds it by more than 5 standard deviations of a fair draw. PINNED are │
      │ new pins, MOVED are pins that had to change pods.                        │n…
      └──────────────────────────────────────────────────────────────────────────┘


    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
    insta::assert_snapshot!(frame(&mut state, 40, 10), @r"
    a┌ help ──────────────────────────────┐s
     │ arrows, j k   move; also PgUp PgDn │
    ▸│               Home End             │
     │ Enter, right  open the service;    │
     │               from a pod, its      │
     │               clients              │
     │ Esc, left     back; drop the       │
     │               filter               │
     │ Tab           from pods to         │
    ?└────────────────────────────────────┘…
    ");
}

#[test]
fn questions() {
    let (_, mut state) = front();
    press(&mut state, "<tab><down><down>u");
    insta::assert_snapshot!(frame(&mut state, 80, 15), @r"
    affinity top > shop/front                                               every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.1:80/TCP
      65.5 connections/s  4.0 pinned/s  1.0 moved/s  0 refused/s
    ── 3 pods, 1390 pins each on average ───────────────────────────────────────────
      ┌ unpin ───────────────────────────────────────────────────────────────────┐
      │ Unpin 2001:db8:c:200:feed:beef:0:2 from its pod of shop/front? Its next  │an
      │ connection selects again; open connections stay.                         │
      │                                                                          │
    ──│ y  yes    any other key  no                                              │──
      └──────────────────────────────────────────────────────────────────────────┘
      198.18.0.0                    front-0  10m2s  2s     2h59m    created
      198.18.0.1                    front-1  10m3s  3s     never    backend-gone
    ▸ 2001:db8:c:200:feed:beef:0:2  front-2  10m4s  4s     expired  operator
      198.18.0.3                    front-0  10m5s  5s     2h59m    created
    ? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause
    ");
    press(&mut state, "n<esc>/dns<enter>U");
    insta::assert_snapshot!(frame(&mut state, 60, 12), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 … every 1s
      SERVICE          READY  PINS▾  CONN/S  REFUSED/S  HOT SPOT
    ▸┌ unpin ─────────────────────────────────────────────────┐
     │ Unpin all clients of kube-system/dns, and of all       │
     │ services in the group kube-system/infra? Their next    │
     │ connection selects again; open connections stay.       │
     │                                                        │
     │ y  yes    any other key  no                            │
     └────────────────────────────────────────────────────────┘


    filter /dns  ? help  q quit  Enter open  / filter  s sort  …
    ");
}

#[test]
fn an_error_while_paused() {
    let mut state = busy_shop().1;
    press(&mut state, "p");
    state.say("no dataplane at /sys/fs/bpf/affinity: run `affinity run` or `affinity attach`", true);
    insta::assert_snapshot!(frame(&mut state, 60, 8), @r"
    affinity top  4 services  8 pods  4195 pins  69.5 co… paused
      SERVICE          READY  PINS▾  CONN/S  HOT SPOT
    ▸ shop/front         3/3   4170    65.5  front-1 1.7x
      shop/cart          1/2     21     4.0
      kube-system/dns    2/2      4       0
      shop/static        1/1      -       0

    no dataplane at /sys/fs/bpf/affinity: run `affinity run` or…
    ");
}

#[test]
fn a_source_that_does_not_answer() {
    let mut scene = Scene::shop();
    scene.sample.source = Some("kubernetes: 3m old".to_owned());
    insta::assert_snapshot!(frame(&mut scene.state(), 80, 6), @r"
    affinity top  4 services  8 pods  4195 pins  - connections/s  kubernetes: 3m old
      SERVICE          READY  PINS▾  CONN/S  MOVED/S  REFUSED/S  HOT SPOT
    ▸ shop/front         3/3   4170       -        -          -  front-1 1.7x
      shop/cart          1/2     21       -        -          -
      kube-system/dns    2/2      4       -        -          -
    ? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause
    ");
}

#[test]
fn without_keys_everything_is_shown() {
    let mut scene = Scene::shop();
    let mut state = State::new(Duration::from_secs(1), false);
    state.set_sample(scene.sample.clone());
    scene.count(1, 0, [3, 40, 0, 0]);
    scene.later(&mut state, 1);
    let height = full_height(&state);
    insta::assert_snapshot!(frame(&mut state, 100, height), @r"
    affinity top  4 services  8 pods  4195 pins  43.0 connections/s                             every 1s
      SERVICE          READY  PINS▾  CONN/S  PINNED/S  MOVED/S  REFUSED/S  HOT SPOT
      shop/front         3/3   4170    43.0       3.0        0          0  front-1 1.7x
      shop/cart          1/2     21       0         0        0          0
      kube-system/dns    2/2      4       0         0        0          0
      shop/static        1/1      -       0         0        0          0

    ── events ──────────────────────────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1
       1m15s ago  moved shop/cart 2001:db8:c::4 -> shop/cart-1 > shop/cart-0 reason=not-ready
    ");
    assert!(state.open("shop/front") && !state.open("shop/back"));
    scene.answer(&mut state, client_rows(7));
    let height = full_height(&state);
    insta::assert_snapshot!(frame(&mut state, 100, height), @r"
    affinity top > shop/front                                                                   every 1s
      ClientIP timer=connection timeout=10800s select=random  10.96.0.1:80/TCP
      43.0 connections/s  3.0 pinned/s  0 moved/s  0 refused/s
    ── 3 pods, 1390 pins each on average ───────────────────────────────────────────────────────────────
      POD      ADDRESS      STATE  CONN/S  PINS▾                                           HOT SPOT
      front-1  10.244.1.11  ready       0   2400  ███████████████████████████████████████  1.7x the mean
      front-0  10.244.1.10  ready    43.0    900  ██████████████▋
      front-2  10.244.1.12  ready       0    870  ██████████████▏
    ── 7 clients ───────────────────────────────────────────────────────────────────────────────────────
      CLIENT                        POD      AGE    IDLE▾  EXPIRES  REASON
      198.18.0.0                    front-0  10m1s  1s     2h59m    created
      198.18.0.1                    front-1  10m2s  2s     never    backend-gone
      2001:db8:c:200:feed:beef:0:2  front-2  10m3s  3s     expired  operator
      198.18.0.3                    front-0  10m4s  4s     2h59m    created
      198.18.0.4                    front-1  10m5s  5s     never    backend-gone
      2001:db8:c:500:feed:beef:0:5  front-2  10m6s  6s     expired  operator
      198.18.0.6                    front-0  10m7s  7s     2h59m    created
    ── events ──────────────────────────────────────────────────────────────────────────────────────────
          2s ago  created shop/front 198.18.0.9 -> shop/front-1
    ");
}
