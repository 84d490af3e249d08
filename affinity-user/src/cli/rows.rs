//! Views as rows of tables.

use std::time::Duration;

use super::output::{Cell, Column, Row, Tone};
use crate::view::{
    BackendState, BackendView, CounterView, DeviceView, EventView, FlowState, FlowView, PodRef, ServiceView,
    SessionView, short_duration,
};

fn age(age: Duration) -> Cell {
    Cell::new(short_duration(age.as_secs()))
}

fn optional(text: Option<impl ToString>) -> Cell {
    text.map_or_else(|| Cell::toned("-", Tone::Faint), |text| Cell::new(text.to_string()))
}

fn pod(backend: &PodRef<'_>) -> Cell {
    match (backend.name, backend.address) {
        (Some(name), _) => Cell::new(name),
        (None, Some(_)) => Cell::toned("-", Tone::Faint),
        (None, None) => Cell::toned("(gone)", Tone::Bad),
    }
}

impl Row for SessionView<'_> {
    const COLUMNS: &'static [Column] = &[
        Column::text("SERVICE"),
        Column::text("CLIENT"),
        Column::text("POD"),
        Column::text("ADDRESS"),
        Column::text("AGE"),
        Column::text("IDLE"),
        Column::text("EXPIRES"),
        Column::text("REASON"),
        Column::number("USES").wide(),
        Column::number("CONNECTIONS").wide(),
        Column::text("GROUP").wide(),
        Column::text("CREATED").wide(),
    ];

    fn cells(&self) -> Vec<Cell> {
        vec![
            Cell::new(&*self.service),
            Cell::new(self.client.to_string()),
            pod(&self.backend),
            optional(self.backend.address),
            age(self.created.age),
            age(self.last_used.age),
            match self.expires_in_seconds {
                None => Cell::new("never"),
                Some(0) => Cell::toned("expired", Tone::Faint),
                Some(seconds) => Cell::new(short_duration(seconds)),
            },
            Cell::new(self.reason),
            Cell::number(self.uses),
            optional(self.connections),
            optional(self.group),
            Cell::new(self.created.to_string()),
        ]
    }
}

impl Row for FlowView<'_> {
    const COLUMNS: &'static [Column] = &[
        Column::text("SERVICE"),
        Column::text("PROTOCOL"),
        Column::text("CLIENT"),
        Column::text("FRONTEND"),
        Column::text("POD"),
        Column::text("TRANSLATED"),
        Column::text("STATE"),
        Column::text("AGE"),
        Column::text("IDLE"),
        Column::text("CREATED").wide(),
    ];

    fn cells(&self) -> Vec<Cell> {
        let tone = if self.state == FlowState::Open { Tone::Plain } else { Tone::Faint };
        vec![
            Cell::new(&*self.service),
            Cell::new(self.protocol),
            Cell::new(self.client.to_string()),
            Cell::new(self.frontend.to_string()),
            pod(&self.backend),
            Cell::new(self.translated.to_string()),
            Cell::toned(self.state.name(), tone),
            age(self.created.age),
            age(self.last_used.age),
            Cell::new(self.created.to_string()),
        ]
    }
}

impl Row for ServiceView<'_> {
    const COLUMNS: &'static [Column] = &[
        Column::text("SERVICE"),
        Column::text("AFFINITY"),
        Column::text("TIMEOUT"),
        Column::text("TIMER"),
        Column::text("SELECT"),
        Column::text("ENDPOINTS"),
        Column::number("SESSIONS"),
        Column::number("CONNECTIONS"),
        Column::text("FRONTENDS"),
        Column::text("ALL FRONTENDS").wide(),
        Column::text("GROUP").wide(),
        Column::text("PREFIX").wide(),
        Column::number("CREATED").wide(),
        Column::number("PINNED").wide(),
        Column::number("EXPIRED").wide(),
        Column::number("MOVED").wide(),
        Column::number("REFUSED").wide(),
    ];

    fn cells(&self) -> Vec<Cell> {
        let pinned = self.affinity != "None";
        let if_pinned = |text: String| if pinned { Cell::new(text) } else { Cell::toned("-", Tone::Faint) };
        let frontends: Vec<_> =
            self.frontends.iter().map(|frontend| format!("{}/{}", frontend.endpoint, frontend.protocol)).collect();
        let prefixes = [self.client_prefix_v4, self.client_prefix_v6];
        let prefixes: Vec<_> = prefixes.iter().flatten().map(|prefix| format!("/{prefix}")).collect();
        let [_, created, followed, expired, gone, not_ready, not_member, refused] = self.connections.0;
        vec![
            Cell::new(&*self.service),
            Cell::new(if self.shadow { format!("{} (shadow)", self.affinity) } else { self.affinity.to_owned() }),
            if_pinned(self.timeout_seconds.map_or_else(|| "unlimited".to_owned(), short_duration)),
            if_pinned(self.timer.to_owned()),
            Cell::new(self.select),
            endpoints(self),
            if_pinned(self.sessions.to_string()),
            Cell::number(self.connections.accepted()),
            Cell::new(first_of(&frontends)),
            Cell::new(frontends.join(",")),
            optional(self.group),
            if_pinned(prefixes.join(",")),
            Cell::number(created),
            Cell::number(followed),
            Cell::number(expired),
            Cell::number(gone + not_ready + not_member),
            Cell::toned(refused.to_string(), if refused > 0 { Tone::Bad } else { Tone::Plain }),
        ]
    }
}

/// Few texts completely; of four or more, the first two and the number of further ones.
fn first_of(texts: &[String]) -> String {
    match texts {
        [first, second, _, _, ..] => format!("{first},{second},+{}", texts.len() - 2),
        few => few.join(","),
    }
}

fn endpoints(service: &ServiceView<'_>) -> Cell {
    let (ready, draining) = (service.endpoints.ready, service.endpoints.draining);
    let text = if draining > 0 { format!("{ready} (+{draining} draining)") } else { ready.to_string() };
    let tone = match (ready, draining) {
        (0, _) => Tone::Bad,
        (_, 0) => Tone::Plain,
        _ => Tone::Attention,
    };
    Cell::toned(text, tone)
}

impl Row for BackendView<'_> {
    const COLUMNS: &'static [Column] = &[
        Column::text("POD"),
        Column::text("ADDRESS"),
        Column::text("STATE"),
        Column::number("SESSIONS"),
        Column::number("CONNECTIONS"),
        Column::number("OPEN"),
        Column::text("SERVICES"),
        Column::text("NAMESPACE").wide(),
        Column::text("LOCAL").wide(),
    ];

    fn cells(&self) -> Vec<Cell> {
        let tone = match self.state {
            BackendState::Ready => Tone::Good,
            BackendState::Draining => Tone::Attention,
            BackendState::Lingering | BackendState::Unused => Tone::Faint,
        };
        vec![
            pod(&self.backend),
            optional(self.backend.address),
            Cell::toned(self.state.name(), tone),
            Cell::number(self.sessions),
            Cell::number(self.connections),
            optional(self.open),
            optional(Some(self.services.join(",")).filter(|services| !services.is_empty())),
            optional(self.backend.namespace),
            Cell::new(if self.local { "yes" } else { "no" }),
        ]
    }
}

impl Row for CounterView {
    const COLUMNS: &'static [Column] = &[Column::text("REASON"), Column::number("PACKETS"), Column::text("MEANING")];

    fn cells(&self) -> Vec<Cell> {
        let tone = if self.packets == 0 { Tone::Faint } else { Tone::Plain };
        vec![Cell::new(self.reason), Cell::toned(self.packets.to_string(), tone), Cell::toned(self.text, Tone::Faint)]
    }
}

impl Row for DeviceView {
    const COLUMNS: &'static [Column] = &[
        Column::text("DEVICE"),
        Column::number("INDEX"),
        Column::text("ROLE"),
        Column::text("INGRESS"),
        Column::text("EGRESS"),
        Column::text("PROGRAMS").wide(),
        Column::text("WHY").wide(),
        Column::text("NOTE"),
    ];

    fn cells(&self) -> Vec<Cell> {
        let hook = |hooks: &[&str]| match hooks {
            [] => Cell::toned("-", Tone::Bad),
            hooks => Cell::new(hooks.join(",")),
        };
        let programs: Vec<_> = self.programs.iter().map(u32::to_string).collect();
        vec![
            self.device.as_deref().map_or_else(|| Cell::toned("(gone)", Tone::Bad), Cell::new),
            if self.ifindex == 0 { Cell::toned("-", Tone::Faint) } else { Cell::number(self.ifindex) },
            optional(self.role),
            hook(&self.ingress),
            hook(self.egress.as_slice()),
            Cell::new(programs.join(",")),
            optional(self.why.as_deref()),
            optional(self.note.as_deref()),
        ]
    }
}

impl Row for EventView<'_> {
    const COLUMNS: &'static [Column] = &[
        Column::text("TIME"),
        Column::text("EVENT"),
        Column::text("SERVICE"),
        Column::text("CLIENT"),
        Column::text("FROM"),
        Column::text("TO"),
        Column::text("REASON"),
        Column::text("AGE").wide(),
    ];

    fn cells(&self) -> Vec<Cell> {
        let evicted = self.evicted.map(|evicted| format!("{evicted} pins"));
        let client = self.client.map(|client| client.to_string());
        vec![
            Cell::toned(self.time.to_string(), Tone::Faint),
            Cell::new(self.kind),
            optional(self.service.as_deref()),
            optional(client.or(evicted)),
            optional(self.from),
            optional(self.to),
            optional(self.reason.filter(|&reason| reason != self.kind)),
            age(self.time.age),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        path::PathBuf,
    };

    use super::*;
    use crate::{
        attach::{Attachment, Finding, Hook, Note, Role, Why},
        cli::output::{Format, Listing, SAMPLE_ROWS, list},
        view::{Catalog, LiveSessions, fixture},
    };

    fn print<R: Row>(rows: &[R], format: Format) -> String {
        let mut out = Vec::new();
        list(&mut out, format, false, rows).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn sessions(catalog: &Catalog) -> Vec<SessionView<'_>> {
        let v4 = fixture::sessions_v4().into_iter().map(|(key, session)| SessionView::new(catalog, &key, &session));
        let v6 = fixture::sessions_v6().into_iter().map(|(key, session)| SessionView::new(catalog, &key, &session));
        v4.chain(v6).collect()
    }

    fn live(catalog: &Catalog) -> LiveSessions {
        let mut live = LiveSessions::default();
        for (_, session) in fixture::sessions_v4() {
            live.add(catalog, &session);
        }
        for (_, session) in fixture::sessions_v6() {
            live.add(catalog, &session);
        }
        live
    }

    #[test]
    fn sessions_as_table_wide_json_and_yaml() {
        let catalog = fixture::catalog();
        let sessions = sessions(&catalog);
        insta::assert_snapshot!(print(&sessions, Format::Table), @r"
        SERVICE           CLIENT           POD      ADDRESS      AGE      IDLE     EXPIRES   REASON
        default/web       192.0.2.1        web-0    10.244.0.1   16m40s   10s      2h59m     created
        default/web       192.0.2.20       web-1    10.244.0.2   45s      45s      2h59m     backend-gone
        default/web       198.51.100.7     web-9    10.244.0.4   2h45m    2h44m    15m50s    created
        default/web       198.51.100.8     (gone)   -            16m40s   16m39s   2h43m     created
        kube-system/dns   203.0.113.0/24   -        10.244.0.3   16m40s   10s      never     created
        #77               203.0.113.9      web-1    10.244.0.2   2h46m    2h46m    expired   created
        kube-system/dns   2001:db8::/64    -        10.244.0.3   16m40s   10m      never     operator
        ");
        insta::assert_snapshot!(print(&sessions, Format::Wide), @r"
        SERVICE           CLIENT           POD      ADDRESS      AGE      IDLE     EXPIRES   REASON         USES   CONNECTIONS   GROUP               CREATED
        default/web       192.0.2.1        web-0    10.244.0.1   16m40s   10s      2h59m     created           3             -   -                   2026-03-01T11:43:20.000Z
        default/web       192.0.2.20       web-1    10.244.0.2   45s      45s      2h59m     backend-gone      3             -   -                   2026-03-01T11:59:15.000Z
        default/web       198.51.100.7     web-9    10.244.0.4   2h45m    2h44m    15m50s    created           3             -   -                   2026-03-01T09:15:00.000Z
        default/web       198.51.100.8     (gone)   -            16m40s   16m39s   2h43m     created           3             -   -                   2026-03-01T11:43:20.000Z
        kube-system/dns   203.0.113.0/24   -        10.244.0.3   16m40s   10s      never     created           3             2   kube-system/infra   2026-03-01T11:43:20.000Z
        #77               203.0.113.9      web-1    10.244.0.2   2h46m    2h46m    expired   created           3             -   -                   2026-03-01T09:13:21.000Z
        kube-system/dns   2001:db8::/64    -        10.244.0.3   16m40s   10m      never     operator          3             0   kube-system/infra   2026-03-01T11:43:20.000Z
        ");
        insta::assert_snapshot!(print(&sessions, Format::Json), @r##"
        [
        {"service":"default/web","client":"192.0.2.1","backend":{"address":"10.244.0.1","name":"web-0","namespace":"default"},"created":"2026-03-01T11:43:20.000Z","lastUsed":"2026-03-01T11:59:50.000Z","expiresInSeconds":10790,"reason":"created","group":null,"uses":3,"connections":null},
        {"service":"default/web","client":"192.0.2.20","backend":{"address":"10.244.0.2","name":"web-1","namespace":"default"},"created":"2026-03-01T11:59:15.000Z","lastUsed":"2026-03-01T11:59:15.000Z","expiresInSeconds":10755,"reason":"backend-gone","group":null,"uses":3,"connections":null},
        {"service":"default/web","client":"198.51.100.7","backend":{"address":"10.244.0.4","name":"web-9","namespace":"default"},"created":"2026-03-01T09:15:00.000Z","lastUsed":"2026-03-01T09:15:50.000Z","expiresInSeconds":950,"reason":"created","group":null,"uses":3,"connections":null},
        {"service":"default/web","client":"198.51.100.8","backend":{"address":null,"name":null,"namespace":null},"created":"2026-03-01T11:43:20.000Z","lastUsed":"2026-03-01T11:43:21.000Z","expiresInSeconds":9801,"reason":"created","group":null,"uses":3,"connections":null},
        {"service":"kube-system/dns","client":"203.0.113.0/24","backend":{"address":"10.244.0.3","name":null,"namespace":null},"created":"2026-03-01T11:43:20.000Z","lastUsed":"2026-03-01T11:59:50.000Z","expiresInSeconds":null,"reason":"created","group":"kube-system/infra","uses":3,"connections":2},
        {"service":"#77","client":"203.0.113.9","backend":{"address":"10.244.0.2","name":"web-1","namespace":"default"},"created":"2026-03-01T09:13:21.000Z","lastUsed":"2026-03-01T09:13:21.000Z","expiresInSeconds":0,"reason":"created","group":null,"uses":3,"connections":null},
        {"service":"kube-system/dns","client":"2001:db8::/64","backend":{"address":"10.244.0.3","name":null,"namespace":null},"created":"2026-03-01T11:43:20.000Z","lastUsed":"2026-03-01T11:50:00.000Z","expiresInSeconds":null,"reason":"operator","group":"kube-system/infra","uses":3,"connections":0}
        ]
        "##);
        insta::assert_snapshot!(print(&sessions[..2], Format::Yaml), @r#"
        - service: default/web
          client: "192.0.2.1"
          backend:
            address: "10.244.0.1"
            name: web-0
            namespace: default
          created: "2026-03-01T11:43:20.000Z"
          lastUsed: "2026-03-01T11:59:50.000Z"
          expiresInSeconds: 10790
          reason: created
          group: null
          uses: 3
          connections: null
        - service: default/web
          client: "192.0.2.20"
          backend:
            address: "10.244.0.2"
            name: web-1
            namespace: default
          created: "2026-03-01T11:59:15.000Z"
          lastUsed: "2026-03-01T11:59:15.000Z"
          expiresInSeconds: 10755
          reason: backend-gone
          group: null
          uses: 3
          connections: null
        "#);
    }

    #[test]
    fn services_as_table_wide_and_json() {
        let catalog = fixture::catalog();
        let services = ServiceView::all(&catalog, &live(&catalog));
        insta::assert_snapshot!(print(&services, Format::Table), @r"
        SERVICE           AFFINITY   TIMEOUT     TIMER        SELECT       ENDPOINTS         SESSIONS   CONNECTIONS   FRONTENDS
        default/web       ClientIP   3h          connection   random       2                        2            27   10.96.0.10:80/TCP,10.96.0.10:443/TCP
        kube-system/dns   ClientIP   unlimited   alive        consistent   0 (+1 draining)          2             0   10.96.0.53:53/UDP,[2001:db8::53]:53/UDP
        ");
        insta::assert_snapshot!(print(&services, Format::Wide), @r"
        SERVICE           AFFINITY   TIMEOUT     TIMER        SELECT       ENDPOINTS         SESSIONS   CONNECTIONS   FRONTENDS                                 ALL FRONTENDS                             GROUP               PREFIX    CREATED   PINNED   EXPIRED   MOVED   REFUSED
        default/web       ClientIP   3h          connection   random       2                        2            27   10.96.0.10:80/TCP,10.96.0.10:443/TCP      10.96.0.10:80/TCP,10.96.0.10:443/TCP      -                   /32             4       20         1       2         3
        kube-system/dns   ClientIP   unlimited   alive        consistent   0 (+1 draining)          2             0   10.96.0.53:53/UDP,[2001:db8::53]:53/UDP   10.96.0.53:53/UDP,[2001:db8::53]:53/UDP   kube-system/infra   /24,/64         0        0         0       0         0
        ");
        insta::assert_snapshot!(print(&services, Format::Json), @r#"
        [
        {"service":"default/web","affinity":"ClientIP","shadow":false,"timer":"connection","timeoutSeconds":10800,"select":"random","group":null,"clientPrefixV4":32,"clientPrefixV6":null,"frontends":[{"address":"10.96.0.10","port":80,"protocol":"TCP","endpoints":{"ready":2,"draining":0}},{"address":"10.96.0.10","port":443,"protocol":"TCP","endpoints":{"ready":1,"draining":1}}],"endpoints":{"ready":2,"draining":0},"sessions":2,"connections":{"selected":0,"created":4,"pinned":20,"expired":1,"backend-gone":2,"not-ready":0,"not-member":0,"no-endpoints":3},"clientsAreNodes":false,"asOf":null},
        {"service":"kube-system/dns","affinity":"ClientIP","shadow":false,"timer":"alive","timeoutSeconds":null,"select":"consistent","group":"kube-system/infra","clientPrefixV4":24,"clientPrefixV6":64,"frontends":[{"address":"10.96.0.53","port":53,"protocol":"UDP","endpoints":{"ready":0,"draining":1}},{"address":"2001:db8::53","port":53,"protocol":"UDP","endpoints":{"ready":0,"draining":0},"external":{"ready":0,"draining":0}}],"endpoints":{"ready":0,"draining":1},"sessions":2,"connections":{"selected":0,"created":0,"pinned":0,"expired":0,"backend-gone":0,"not-ready":0,"not-member":0,"no-endpoints":0},"clientsAreNodes":false,"asOf":null}
        ]
        "#);
    }

    #[test]
    fn backends_as_table_wide_and_json() {
        let catalog = fixture::catalog();
        let mut backends = BackendView::all(&catalog, &live(&catalog), &BTreeMap::new());
        let left =
            BackendView { state: BackendState::Lingering, services: Vec::new(), open: Some(3), ..backends[2].clone() };
        backends[2] = left;
        insta::assert_snapshot!(print(&backends, Format::Table), @r"
        POD     ADDRESS      STATE       SESSIONS   CONNECTIONS   OPEN   SERVICES
        -       10.244.0.3   draining           2             0      -   kube-system/dns
        web-0   10.244.0.1   ready              1            18      -   default/web
        web-1   10.244.0.2   lingering          1             0      3   -
        ");
        insta::assert_snapshot!(print(&backends, Format::Wide), @r"
        POD     ADDRESS      STATE       SESSIONS   CONNECTIONS   OPEN   SERVICES          NAMESPACE   LOCAL
        -       10.244.0.3   draining           2             0      -   kube-system/dns   -           no
        web-0   10.244.0.1   ready              1            18      -   default/web       default     yes
        web-1   10.244.0.2   lingering          1             0      3   -                 default     no
        ");
        insta::assert_snapshot!(print(&backends, Format::Json), @r#"
        [
        {"address":"10.244.0.3","name":null,"namespace":null,"services":["kube-system/dns"],"state":"draining","local":false,"sessions":2,"connections":0,"open":null},
        {"address":"10.244.0.1","name":"web-0","namespace":"default","services":["default/web"],"state":"ready","local":true,"sessions":1,"connections":18,"open":null},
        {"address":"10.244.0.2","name":"web-1","namespace":"default","services":[],"state":"lingering","local":false,"sessions":1,"connections":0,"open":3}
        ]
        "#);
    }

    #[test]
    fn flows_as_table_and_json() {
        let catalog = fixture::catalog();
        let (key, flow) = fixture::flow();
        let flows: Vec<_> = [(key, flow), (key.opposite(&flow.edit), flow)]
            .iter()
            .filter_map(|(key, flow)| FlowView::new(&catalog, key, flow))
            .collect();
        insta::assert_snapshot!(print(&flows, Format::Table), @r"
        SERVICE       PROTOCOL   CLIENT            FRONTEND        POD     TRANSLATED        STATE     AGE      IDLE
        default/web   TCP        192.0.2.1:40000   10.96.0.10:80   web-0   10.244.0.1:8080   closing   16m40s   1s
        ");
        insta::assert_snapshot!(print(&flows, Format::Json), @r#"
        [
        {"service":"default/web","protocol":"TCP","client":{"address":"192.0.2.1","port":40000},"frontend":{"address":"10.96.0.10","port":80},"backend":{"address":"10.244.0.1","name":"web-0","namespace":"default"},"translated":{"address":"10.244.0.1","port":8080},"state":"closing","created":"2026-03-01T11:43:20.000Z","lastUsed":"2026-03-01T11:59:59.000Z"}
        ]
        "#);
    }

    #[test]
    fn devices_as_table_wide_and_json() {
        let attachment = |ifindex, hook, prog_id| Attachment { ifindex, hook, prog_id, path: PathBuf::new() };
        let attachments = [
            attachment(2, Hook::XdpNative, 70),
            attachment(2, Hook::TcxEgress, 72),
            attachment(2, Hook::TcxIngress, 71),
            attachment(5, Hook::TcxEgress, 72),
            attachment(5, Hook::TcxIngress, 71),
            attachment(9, Hook::ClsactEgress, 72),
        ];
        let names = |ifindex| (ifindex != 9).then(|| format!("eth{ifindex}"));
        let finding = |why, role| Finding { role, why };
        let roles = BTreeMap::from([
            (2, finding(Why::DefaultRoute, Some(Role::External))),
            (5, finding(Why::PodSide, Some(Role::Internal))),
        ]);
        let devices = DeviceView::all(&attachments, names, &roles, &BTreeMap::from([(5, Note::Mtu)]));
        insta::assert_snapshot!(print(&devices, Format::Table), @r"
        DEVICE   INDEX   ROLE       INGRESS                  EGRESS          NOTE
        eth2         2   external   xdp-native,tcx-ingress   tcx-egress      -
        eth5         5   internal   tcx-ingress              tcx-egress      no XDP: the MTU is too large for the driver
        (gone)       9   -          -                        clsact-egress   -
        ");
        insta::assert_snapshot!(print(&devices, Format::Wide), @r"
        DEVICE   INDEX   ROLE       INGRESS                  EGRESS          PROGRAMS   WHY                                        NOTE
        eth2         2   external   xdp-native,tcx-ingress   tcx-egress      70,71,72   has a default route                        -
        eth5         5   internal   tcx-ingress              tcx-egress      71,72      its peer is in another network namespace   no XDP: the MTU is too large for the driver
        (gone)       9   -          -                        clsact-egress   72         -                                          -
        ");
        insta::assert_snapshot!(print(&devices, Format::Json), @r#"
        [
        {"device":"eth2","ifindex":2,"role":"external","ingress":["xdp-native","tcx-ingress"],"egress":"tcx-egress","programs":[70,71,72],"why":"has a default route","note":null},
        {"device":"eth5","ifindex":5,"role":"internal","ingress":["tcx-ingress"],"egress":"tcx-egress","programs":[71,72],"why":"its peer is in another network namespace","note":"no XDP: the MTU is too large for the driver"},
        {"device":null,"ifindex":9,"role":null,"ingress":[],"egress":"clsact-egress","programs":[72],"why":null,"note":null}
        ]
        "#);
    }

    #[test]
    fn events_as_table_and_json() {
        let catalog = fixture::catalog();
        let events: Vec<_> = fixture::events().iter().filter_map(|event| EventView::new(&catalog, event)).collect();
        insta::assert_snapshot!(print(&events, Format::Table), @r"
        TIME                       EVENT      SERVICE       CLIENT      FROM    TO      REASON
        2026-03-01T11:43:20.000Z   created    default/web   192.0.2.1   -       web-0   -
        2026-03-01T11:45:00.000Z   moved      default/web   192.0.2.1   web-9   web-1   backend-gone
        2026-03-01T11:46:40.000Z   expired    default/web   192.0.2.1   web-1   web-0   -
        2026-03-01T11:48:20.000Z   unpinned   default/web   192.0.2.1   web-0   -       operator
        2026-03-01T11:50:00.000Z   pinned     default/web   192.0.2.1   -       web-1   operator
        2026-03-01T11:59:10.000Z   evicted    -             42 pins     -       -       table-full
        ");
        insta::assert_snapshot!(print(&events, Format::Json), @r#"
        [
        {"time":"2026-03-01T11:43:20.000Z","kind":"created","service":"default/web","client":"192.0.2.1","from":null,"to":{"address":"10.244.0.1","name":"web-0","namespace":"default"},"reason":"created","evicted":null},
        {"time":"2026-03-01T11:45:00.000Z","kind":"moved","service":"default/web","client":"192.0.2.1","from":{"address":"10.244.0.4","name":"web-9","namespace":"default"},"to":{"address":"10.244.0.2","name":"web-1","namespace":"default"},"reason":"backend-gone","evicted":null},
        {"time":"2026-03-01T11:46:40.000Z","kind":"expired","service":"default/web","client":"192.0.2.1","from":{"address":"10.244.0.2","name":"web-1","namespace":"default"},"to":{"address":"10.244.0.1","name":"web-0","namespace":"default"},"reason":"expired","evicted":null},
        {"time":"2026-03-01T11:48:20.000Z","kind":"unpinned","service":"default/web","client":"192.0.2.1","from":{"address":"10.244.0.1","name":"web-0","namespace":"default"},"to":null,"reason":"operator","evicted":null},
        {"time":"2026-03-01T11:50:00.000Z","kind":"pinned","service":"default/web","client":"192.0.2.1","from":null,"to":{"address":"10.244.0.2","name":"web-1","namespace":"default"},"reason":"operator","evicted":null},
        {"time":"2026-03-01T11:59:10.000Z","kind":"evicted","service":null,"client":null,"from":null,"to":null,"reason":"table-full","evicted":42}
        ]
        "#);
    }

    #[test]
    fn counters_as_table_and_json() {
        let counters = CounterView::all(&[0, 0, 0, 0, 0, 1_234_567, 0, 42]);
        insta::assert_snapshot!(print(&counters[..8], Format::Table), @r"
        REASON           PACKETS   MEANING
        not-ip                 0   Passed: neither IPv4 nor IPv6.
        truncated              0   Passed: the frame is shorter than its headers.
        malformed              0   Passed: a header is invalid, for example its length.
        fragment               0   Passed: an IP fragment; the first one of its packet was not translated, or has not arrived yet.
        other-protocol         0   Passed: not TCP, UDP or SCTP, and not an ICMP error about a known flow.
        not-frontend     1234567   Passed: the destination is not a frontend.
        not-reply              0   Passed: not a reply of a known flow.
        established           42   Forwarded: a packet of a known flow.
        ");
        insta::assert_snapshot!(print(&counters[5..6], Format::Json), @r#"
        [
        {"reason":"not-frontend","packets":1234567,"text":"Passed: the destination is not a frontend."}
        ]
        "#);
    }

    /// The fields that docs/cli.md lists in the table below a title.
    fn documented_fields(title: &str) -> BTreeSet<String> {
        const DOCUMENT: &str = include_str!("../../../docs/cli.md");
        let (_, below) =
            DOCUMENT.split_once(&format!("\n**{title}**")).expect("docs/cli.md has a table for each listing");
        let table = below.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
        let cells = table.filter_map(|row| row.split('|').nth(1));
        cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
    }

    #[test]
    fn documented_fields_are_those_of_json() {
        let catalog = fixture::catalog();
        let flow = fixture::flow();
        let flows: Vec<_> = FlowView::new(&catalog, &flow.0, &flow.1).into_iter().collect();
        let events: Vec<_> = fixture::events().iter().filter_map(|event| EventView::new(&catalog, event)).collect();
        let attachment = Attachment { ifindex: 2, hook: Hook::XdpNative, prog_id: 70, path: PathBuf::new() };
        let listings = [
            ("Sessions", print(&sessions(&catalog), Format::Json)),
            ("Services", print(&ServiceView::all(&catalog, &live(&catalog)), Format::Json)),
            ("Backends", print(&BackendView::all(&catalog, &live(&catalog), &BTreeMap::new()), Format::Json)),
            ("Flows", print(&flows, Format::Json)),
            (
                "Devices",
                print(&DeviceView::all(&[attachment], |_| None, &BTreeMap::new(), &BTreeMap::new()), Format::Json),
            ),
            ("Counters", print(&CounterView::all(&[1]), Format::Json)),
            ("Events", print(&events, Format::Json)),
        ];
        for (title, text) in listings {
            let objects: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_str(&text).unwrap();
            let fields: BTreeSet<String> =
                objects.into_iter().next().into_iter().flatten().map(|(name, _)| name).collect();
            let said = documented_fields(title);
            let missing: Vec<_> = fields.difference(&said).collect();
            assert!(missing.is_empty(), "docs/cli.md: add rows for {missing:?} to the table below **{title}**");
            let unknown: Vec<_> = said.difference(&fields).collect();
            assert!(unknown.is_empty(), "docs/cli.md: {unknown:?} are no fields: remove them below **{title}**");
        }
    }

    #[test]
    fn nothing_is_an_empty_list_and_no_table() {
        assert_eq!(print::<SessionView<'_>>(&[], Format::Table), "");
        assert_eq!(print::<SessionView<'_>>(&[], Format::Json), "[]\n");
        assert_eq!(print::<SessionView<'_>>(&[], Format::Yaml), "[]\n");
    }

    #[test]
    fn a_long_listing_is_streamed_and_valid() {
        let catalog = fixture::catalog();
        let sessions = sessions(&catalog);
        let rows = SAMPLE_ROWS * 3;
        for format in [Format::Table, Format::Json, Format::Yaml] {
            let mut out = Vec::new();
            let mut listing = Listing::new::<SessionView<'_>>(&mut out, format, false).with_known_widths(vec![40]);
            for row in sessions.iter().cycle().take(rows) {
                listing.push(row).unwrap();
            }
            assert_eq!(listing.finish().unwrap(), rows as u64);
            let text = String::from_utf8(out).unwrap();
            match format {
                Format::Table | Format::Wide => {
                    assert_eq!(text.lines().count(), rows + 1);
                    // The first column has the known width, and the second begins after it in every row.
                    assert!(text.lines().all(|line| line.get(43..44).is_some_and(|first| first != " ")));
                }
                Format::Json => {
                    let parsed: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
                    assert_eq!(parsed.len(), rows);
                }
                Format::Yaml => {
                    let parsed: Vec<serde_json::Value> = serde_saphyr::from_str(&text).unwrap();
                    assert_eq!(parsed.len(), rows);
                }
            }
        }
    }

    #[test]
    fn colour_goes_around_the_text_and_not_around_the_blanks() {
        let catalog = fixture::catalog();
        let backends = BackendView::all(&catalog, &live(&catalog), &BTreeMap::new());
        let mut out = Vec::new();
        list(&mut out, Format::Table, true, &backends).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("\u{1b}[32mready\u{1b}[0m   "), "{text:?}");
        assert!(!print(&backends, Format::Table).contains('\u{1b}'));
    }
}
