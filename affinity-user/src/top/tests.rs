//! Frames as a terminal of a given size shows them, and the effects of keys.

mod frames;
mod scene;

use std::collections::VecDeque;

use affinity_common::abi::{SourceKind, Status};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use self::scene::{Scene, client_rows};
use super::{
    clients::{ClientOrder, Clients},
    input::{Mode, action},
    sample::Sample,
    state::{Effect, Pane, Screen, State},
    unpin::Target,
};
use crate::view::fixture;

/// Presses keys: letters as they are, named keys in angle brackets.
fn press(state: &mut State, keys: &str) -> Option<Effect> {
    let mut keys: VecDeque<char> = keys.chars().collect();
    let mut effect = None;
    while let Some(key) = keys.pop_front() {
        let code = match key {
            '<' => named(&keys.drain(..).collect::<String>(), &mut keys),
            typed => KeyCode::Char(typed),
        };
        let action = action(state.mode(), KeyEvent::new(code, KeyModifiers::NONE));
        effect = action.and_then(|action| state.act(action));
    }
    effect
}

/// The key that `name>rest` begins with.
fn named(text: &str, rest: &mut VecDeque<char>) -> KeyCode {
    let (name, after) = text.split_once('>').unwrap();
    rest.extend(after.chars());
    match name {
        "enter" => KeyCode::Enter,
        "esc" => KeyCode::Esc,
        "tab" => KeyCode::Tab,
        "down" => KeyCode::Down,
        "end" => KeyCode::End,
        "pgdn" => KeyCode::PageDown,
        other => panic!("no key <{other}>"),
    }
}

#[test]
fn a_sample_has_what_the_tables_hold() {
    let events = fixture::events();
    let sample = Sample::new(&fixture::catalog(), |backend| u64::from(backend) * 10, events.iter());
    insta::assert_debug_snapshot!(sample.services[&1], @r#"
    ServiceSample {
        name: "default/web",
        policy: "ClientIP timer=connection timeout=10800s select=random",
        affinity: true,
        group: None,
        frontends: [
            "10.96.0.10:80/TCP",
            "10.96.0.10:443/TCP",
        ],
        backends: {
            1: true,
            2: true,
        },
        counts: [
            0,
            4,
            20,
            1,
            2,
            0,
            0,
            3,
        ],
    }
    "#);
    insta::assert_debug_snapshot!(sample.backends[&1], @r#"
    BackendSample {
        name: "web-0",
        pod: "default/web-0",
        address: Some(
            10.244.0.1,
        ),
        generation: 1,
        pins: 10,
        counts: [
            0,
            2,
            15,
            1,
            0,
            0,
            0,
            0,
        ],
    }
    "#);
    // Retired backends are gone, and the newest event comes first.
    assert_eq!(sample.backends.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(sample.services[&2].group.as_deref(), Some("kube-system/infra"));
    assert_eq!((sample.events[0].age_s, sample.events[0].service), (50, None));
    assert_eq!(sample.source, None);
    assert_eq!(sample.events[1].line, "pinned default/web 192.0.2.1 -> default/web-1 reason=operator");
}

#[test]
fn a_source_is_mentioned_when_its_view_is_old() {
    let of = |age_s: u64| {
        let now_ns = fixture::clock().now_ns;
        let current_ns = now_ns - age_s * 1_000_000_000;
        let status = Status { source: SourceKind::Kubernetes as u32, started_ns: 1, current_ns, ..Status::default() };
        Sample::new(&fixture::catalog().with_status(&status), |_| 0, [].iter()).source
    };
    assert_eq!(of(1), None);
    assert_eq!(of(240).as_deref(), Some("kubernetes: 4m old"));
}

#[test]
fn a_pod_of_both_families_is_one_row() {
    let mut scene = Scene::empty();
    scene.service(1, "shop/front", &[("front-0", 40), ("front-1", 50), ("front-0", 20), ("front-1", 10)]);
    let mut state = scene.state();
    scene.count(1, 0, [4, 0, 0, 0]);
    scene.count(1, 2, [2, 0, 0, 0]);
    scene.later(&mut state, 1);
    press(&mut state, "<enter>");
    let rows: Vec<_> = state.pods.shown().map(|pod| (&*pod.name, &*pod.address, pod.pins, pod.accepted)).collect();
    assert_eq!(rows, [("front-0", "10.244.1.10 +1", 60, Some(6.0)), ("front-1", "10.244.1.11 +1", 60, Some(0.0))]);
    // No client uses the second family: the first family is no hot spot because of that.
    assert!(state.pods.shown().all(|pod| pod.hot.is_none()));
    assert_eq!((state.mean(), state.service_row().map(|row| row.ready)), (Some(60.0), Some(2)));
}

#[test]
fn keys_open_and_leave_a_service() {
    let mut state = Scene::shop().state();
    assert_eq!((state.screen, state.query()), (Screen::Services, None));
    press(&mut state, "<down><enter>");
    let Screen::Service { id, pane: Pane::Pods } = state.screen else { panic!("{:?}", state.screen) };
    assert_eq!(state.sample.services[&id].name, "shop/cart");
    assert_eq!(state.query().map(|query| query.service), Some(id));
    press(&mut state, "<tab>");
    assert_eq!(state.screen, Screen::Service { id, pane: Pane::Clients });
    press(&mut state, "<esc>");
    assert_eq!((state.screen, state.query()), (Screen::Services, None));
}

#[test]
fn a_pod_opens_as_a_filter_of_clients_and_escape_takes_it_back() {
    let mut state = Scene::shop().state();
    press(&mut state, "<enter><down><enter>");
    let query = state.query().unwrap();
    assert_eq!((query.filter.as_str(), state.filter()), ("front-0", "front-0"));
    assert!(matches!(state.screen, Screen::Service { pane: Pane::Clients, .. }));
    press(&mut state, "<esc>");
    assert_eq!(state.query().unwrap().filter, "");
    assert!(matches!(state.screen, Screen::Service { .. }));
}

#[test]
fn a_filter_is_typed_kept_and_dropped() {
    let mut state = Scene::shop().state();
    press(&mut state, "/CART");
    assert_eq!((state.mode(), state.services.shown().len()), (Mode::Filter, 1));
    press(&mut state, "<enter>");
    assert_eq!((state.mode(), state.filter()), (Mode::Lists, "cart"));
    press(&mut state, "<esc>");
    assert_eq!((state.filter(), state.services.shown().len()), ("", 4));
    press(&mut state, "/x<esc>");
    assert_eq!((state.mode(), state.filter()), (Mode::Lists, ""));
}

#[test]
fn unpinning_one_client_is_asked_about_first() {
    let scene = Scene::shop();
    let mut state = scene.state();
    press(&mut state, "<enter>");
    scene.answer(&mut state, client_rows(3));
    assert_eq!(press(&mut state, "u"), None);
    assert!(
        state.message.as_ref().is_some_and(|message| message.text.contains("selected client")),
        "pods have the cursor"
    );
    assert_eq!(press(&mut state, "<tab>u"), None);
    assert_eq!(state.mode(), Mode::Question);
    assert_eq!(press(&mut state, "n"), None);
    assert_eq!(state.mode(), Mode::Lists);
    press(&mut state, "<down>");
    let effect = press(&mut state, "uy");
    let Some(Effect::Unpin(Target::Client { key, client, service })) = effect else { panic!("{effect:?}") };
    assert_eq!((client.as_str(), service.as_str()), ("198.18.0.1", "shop/front"));
    assert_eq!(key, client_rows(3)[1].key);
}

#[test]
fn unpinning_a_service_names_the_group_that_shares_its_pins() {
    let mut state = Scene::shop().state();
    press(&mut state, "/dns<enter>U");
    let effect = press(&mut state, "y");
    let Some(Effect::Unpin(Target::Service { service, group, .. })) = effect else { panic!("{effect:?}") };
    assert_eq!((service.as_str(), group.as_deref()), ("kube-system/dns", Some("kube-system/infra")));
}

#[test]
fn a_service_that_goes_leaves_its_screen() {
    let mut scene = Scene::shop();
    let mut state = scene.state();
    press(&mut state, "<enter>");
    scene.sample.services.remove(&1);
    scene.later(&mut state, 1);
    assert_eq!(state.screen, Screen::Services);
    assert_eq!(state.message.as_ref().map(|message| message.text.as_str()), Some("shop/front was removed"));
}

#[test]
fn a_new_pass_keeps_the_last_answer() {
    let scene = Scene::shop();
    let mut state = scene.state();
    press(&mut state, "<enter>");
    scene.answer(&mut state, client_rows(3));
    let query = state.query().unwrap();
    state.set_clients(&Clients { query, rows: client_rows(1), matching: 1, read: 16_384, complete: false });
    assert_eq!(state.clients.all().len(), 3);
    // A changed query shows what is known so far.
    press(&mut state, "<tab>s");
    let query = state.query().unwrap();
    assert_eq!(query.order, ClientOrder::Age);
    state.set_clients(&Clients { query, rows: client_rows(1), matching: 1, read: 16_384, complete: false });
    assert_eq!(state.clients.all().len(), 1);
}

#[test]
fn pages_are_as_long_as_the_list() {
    let mut state = Scene::many(100).state();
    frames::frame(&mut state, 80, 24);
    press(&mut state, "<pgdn>");
    // 24 lines minus header, titles, events and keys.
    assert_eq!(state.services.position(), 15);
    press(&mut state, "<end>");
    assert_eq!(state.services.position(), 99);
}

#[test]
fn quitting_and_pausing_are_one_key() {
    let mut state = Scene::shop().state();
    assert_eq!((press(&mut state, "p"), state.is_paused()), (None, true));
    assert_eq!((press(&mut state, " "), state.is_paused()), (None, false));
    assert_eq!(press(&mut state, "q"), Some(Effect::Quit));
    assert_eq!(press(&mut state, "?q"), Some(Effect::Quit));
}
