//! Cases that check the steps of a plan one by one, and changes that random worlds rarely make.

use affinity_common::abi::{
    AFFINITY, BACKEND_LINGERING, BACKEND_TERMINATING, COEXIST, DROP_IF_NO_LOCAL, Frontend, MASQUERADE, MEMBER_DRAINING,
    MEMBER_READY, NODE, PODS, RANGES, SCOPE_EXTERNAL, SHADOW, SHARED, SPLIT_SCOPE,
};

use super::{
    properties::check_prefixes,
    world::{
        State::{Leaving, Ready, Unready},
        World,
    },
};
use crate::{
    desired::{BackendName, Options, Services, desired},
    plan::plan,
    source::Problem,
    store::{Capacity, Observed, Op},
};

const CAPACITY: Capacity = Capacity { backends: 64, slots: 4_096, ranges: 64 };

/// Brings `observed` to `world`, and returns the steps as text.
fn bring(observed: &mut Observed, world: &World) -> Vec<String> {
    let (steps, problems) = plan(observed, &world.desired(), CAPACITY);
    assert_eq!(problems, []);
    steps.iter().for_each(|step| observed.apply(step));
    steps.iter().map(tell).collect()
}

/// A step as text, without its ids, which are hashes.
fn tell(step: &Op) -> String {
    let state = |state| match state {
        MEMBER_READY => "ready",
        MEMBER_DRAINING => "draining",
        _ => "?",
    };
    let side = |side| if side == SCOPE_EXTERNAL { " external" } else { "" };
    let range = |scope, prefix_len: u32| {
        let of = match scope {
            PODS => "pods",
            NODE => "the node",
            _ => "a service",
        };
        format!("range of {of} of {}", prefix_len - 32)
    };
    match step {
        Op::PutName(_, name) => format!("name {name}"),
        Op::RemoveName(_) => "remove a name".to_owned(),
        Op::PutBackend(index, backend) => {
            let flags = [(BACKEND_LINGERING, " lingering"), (BACKEND_TERMINATING, " terminating")];
            let flags = flags.iter().filter(|(flag, _)| backend.flags & flag != 0).map(|(_, name)| *name);
            format!("put backend {index} generation {}{}", backend.generation, flags.collect::<String>())
        }
        Op::PutMember(key, member) => {
            format!("put member {} port {} {}", key.backend, member.port.get(), state(member.state))
        }
        Op::RemoveMember(key) => format!("remove member {}", key.backend),
        Op::WriteSlots { first, backends } => format!("write slots {first}: {backends:?}"),
        Op::SetFilter(direction, bits) => format!("set {} bits {direction:?}", bits.len()),
        Op::PutUsage(_) => "put usage".to_owned(),
        Op::RemoveUsage(_) => "remove usage".to_owned(),
        Op::PutNode(node) => format!("masquerade from {} ports", node.port_count),
        Op::PutRangeV4(key) => format!("put {}", range(key.scope, key.prefix_len)),
        Op::PutRangeV6(key) => format!("put {}", range(key.scope, key.prefix_len)),
        Op::RemoveRangeV4(key) => format!("remove {}", range(key.scope, key.prefix_len)),
        Op::RemoveRangeV6(key) => format!("remove {}", range(key.scope, key.prefix_len)),
        Op::PutFrontendV4(key, record) => frontend(key.port.get(), side(key.scope), record),
        Op::PutFrontendV6(key, record) => frontend(key.port.get(), side(key.scope), record),
        Op::RemoveFrontendV4(key) => format!("remove frontend :{}{}", key.port.get(), side(key.scope)),
        Op::RemoveFrontendV6(key) => format!("remove frontend :{}{}", key.port.get(), side(key.scope)),
        Op::Grace => "grace".to_owned(),
    }
}

fn frontend(port: u16, side: &str, record: &Frontend) -> String {
    let flags = [
        (SHARED, " shared"),
        (SPLIT_SCOPE, " split-scope"),
        (MASQUERADE, " masqueraded"),
        (RANGES, " in ranges"),
        (DROP_IF_NO_LOCAL, " drop-if-no-local"),
    ];
    let flags: String = flags.iter().filter(|(flag, _)| record.flags & flag != 0).map(|(_, name)| *name).collect();
    format!("put frontend :{port}{side} slots {}+{}{flags}", record.slot_first, record.slot_count)
}

#[test]
fn the_life_of_a_service() {
    let mut observed = Observed::default();
    let mut bring = |parts: &[_]| bring(&mut observed, &World::of(&[parts])).join("\n");
    insta::assert_snapshot!(bring(&[(1, Ready, true), (2, Ready, true)]), @r"
    name default/s1
    name default/s1:b/UDP/v4
    name default/s1:a/TCP/v4
    name default/p1
    name default/p2
    put usage
    put usage
    put usage
    put range of the node of 32
    put range of the node of 128
    masquerade from 28976 ports
    set 2 bits Dnat
    set 4 bits RevDnat
    put backend 0 generation 1
    put backend 1 generation 1
    put member 0 port 5353 ready
    put member 1 port 5353 ready
    put member 0 port 8080 ready
    put member 1 port 8080 ready
    write slots 0: [0, 1]
    write slots 2: [0, 1]
    put frontend :80 slots 0+2
    put frontend :81 slots 2+2
    ");
    // A pod is added, and one drains.
    insta::assert_snapshot!(bring(&[(1, Unready, true), (2, Ready, true), (3, Ready, true)]), @r"
    name default/p3
    put usage
    set 2 bits RevDnat
    put backend 2 generation 1
    put member 2 port 5353 ready
    put member 2 port 8080 ready
    write slots 4: [1, 2]
    write slots 6: [1, 2]
    put frontend :80 slots 4+2
    put frontend :81 slots 6+2
    grace
    put member 0 port 5353 draining
    put member 0 port 8080 draining
    ");
    // The draining pod has left: its connections continue.
    insta::assert_snapshot!(bring(&[(2, Ready, true), (3, Ready, true)]), @r"
    grace
    remove member 0
    remove member 0
    put backend 0 generation 1 lingering
    ");
    // It is back, as the same backend.
    insta::assert_snapshot!(bring(&[(1, Unready, true), (2, Ready, true), (3, Ready, true)]), @r"
    set 2 bits RevDnat
    put backend 0 generation 1
    put member 0 port 5353 draining
    put member 0 port 8080 draining
    ");
}

/// A pod that was seen terminating and is gone from all slices is dead.
#[test]
fn a_dead_pod_is_retired_at_once() {
    let mut observed = Observed::default();
    let mut bring = |parts: &[_]| bring(&mut observed, &World::of(&[parts])).join("\n");
    bring(&[(1, Ready, true), (2, Ready, true)]);
    bring(&[(1, Leaving, true), (2, Ready, true)]);
    insta::assert_snapshot!(bring(&[(2, Ready, true)]), @r"
    grace
    remove member 0
    remove member 0
    put backend 0 generation 2
    remove usage
    ");
}

/// A pod at an address in a pod network is dead once another pod has the address; elsewhere pods may share an address.
#[test]
fn a_pod_whose_address_another_one_has_is_retired_at_once() {
    let world = |pod: &str, network: Option<&str>| {
        let mut desired = World::of(&[&[(1, Ready, false)]]).desired();
        let renamed = |name: &BackendName| BackendName { pod: pod.into(), ..name.clone() };
        desired.backends = desired.backends.iter().map(|(name, local)| (renamed(name), *local)).collect();
        for pool in desired.pools.values_mut() {
            pool.members = pool.members.iter().map(|(name, member)| (renamed(name), *member)).collect();
        }
        desired.pod_networks = network.iter().flat_map(|network| network.parse()).collect();
        desired
    };
    for (network, generations) in [(Some("10.1.0.0/16"), [2, 1]), (None, [1, 1])] {
        let mut observed = Observed::default();
        for pod in ["default/blue", "default/green"] {
            let (steps, _) = plan(&observed, &world(pod, network), CAPACITY);
            steps.iter().for_each(|step| observed.apply(step));
        }
        let found: Vec<u32> = observed.backends.values().map(|record| record.generation).collect();
        assert_eq!(found, generations, "{network:?}");
    }
}

#[test]
fn the_last_pods_of_a_service() {
    let mut observed = Observed::default();
    let mut bring = |parts: &[_]| bring(&mut observed, &World::of(&[parts])).join("\n");
    bring(&[(1, Ready, true), (2, Ready, true)]);
    bring(&[(1, Unready, true), (2, Ready, true), (3, Ready, true)]);
    bring(&[(2, Ready, true), (3, Ready, true)]);
    // No pod is ready, but one still serves.
    insta::assert_snapshot!(bring(&[(2, Leaving, true)]), @r"
    put backend 1 generation 1 terminating
    write slots 0: [1]
    write slots 1: [1]
    put frontend :80 slots 0+1
    put frontend :81 slots 1+1
    grace
    remove member 2
    remove member 2
    put backend 2 generation 1 lingering
    ");
    insta::assert_snapshot!(bring(&[]), @r"
    put frontend :80 slots 0+0
    put frontend :81 slots 0+0
    grace
    remove member 1
    remove member 1
    put backend 1 generation 2
    remove usage
    ");
    insta::assert_snapshot!(bring(&[]), @"");
}

#[test]
fn the_end_of_a_service() {
    let mut observed = Observed::default();
    bring(&mut observed, &World::of(&[&[(1, Ready, true)]]));
    insta::assert_snapshot!(bring(&mut observed, &World::of(&[])).join("\n"), @r"
    remove frontend :80
    remove frontend :81
    grace
    remove member 0
    remove member 0
    put backend 0 generation 1 lingering
    remove usage
    ");
    // All names stay, because sessions and events still refer to them, and so that a service that is created again is the same.
    let names: Vec<_> = observed.names.values().collect();
    assert_eq!(names, ["default/s1", "default/s1:b/UDP/v4", "default/s1:a/TCP/v4", "default/p1"]);
    assert!(observed.members.is_empty() && observed.slots.is_empty());
    let before = observed.names.clone();
    bring(&mut observed, &World::of(&[&[(1, Ready, true)]]));
    assert_eq!((observed.names, observed.backends[&0].generation), (before, 1));
}

/// The pools of a service begin to differ, and later agree again: a client that gets the new pod on one port must not lose it
/// by connecting to the other port, which does not have it.
#[test]
fn pools_come_to_differ_and_to_agree() {
    let alike: &[_] = &[(1, Ready, true), (2, Ready, true)];
    let differ: &[_] = &[(1, Ready, true), (2, Ready, true), (3, Ready, false), (4, Ready, false), (5, Ready, false)];
    let mut observed = Observed::default();
    bring(&mut observed, &World::of(&[alike]));
    let steps = bring(&mut observed, &World::of(&[differ]));
    insta::assert_snapshot!(steps.join("\n"), @r"
    name default/p3
    name default/p4
    name default/p5
    put usage
    put usage
    put usage
    set 3 bits RevDnat
    put backend 2 generation 1
    put backend 3 generation 1
    put backend 4 generation 1
    put member 2 port 8080 ready
    put member 3 port 8080 ready
    put member 4 port 8080 ready
    put member 0 port 0 ready
    put member 1 port 0 ready
    put member 2 port 0 ready
    put member 3 port 0 ready
    put member 4 port 0 ready
    put frontend :80 slots 0+2 shared
    put frontend :81 slots 2+2 shared
    write slots 4: [0, 1, 2, 3, 4]
    put frontend :80 slots 4+5 shared
    grace
    ");
    check_prefixes(&[World::of(&[alike]), World::of(&[differ]), World::of(&[alike])]);
}

/// After a restart, one file is bad: the services in it stay, and what other files contain takes effect.
#[test]
fn what_could_not_be_read_is_kept() {
    let one: &[_] = &[(1, Ready, true), (2, Ready, true)];
    let mut observed = Observed::default();
    bring(&mut observed, &World::of(&[one, one]));

    // The second service was in the bad file; the first has lost a pod.
    let mut snapshot = World::of(&[&one[1..]]).snapshot();
    snapshot.partial = true;
    let (steps, _) = plan(&observed, &World::of(&[]).decide(&snapshot), CAPACITY);
    insta::assert_snapshot!(steps.iter().map(tell).collect::<Vec<_>>().join("\n"), @r"
    write slots 8: [1]
    write slots 9: [1]
    put frontend :80 slots 8+1
    put frontend :81 slots 9+1
    grace
    remove member 0
    remove member 0
    ");
    steps.iter().for_each(|step| observed.apply(step));

    // Now all slices are in the bad file.
    let mut snapshot = World::of(&[one, one]).snapshot();
    snapshot.partial = true;
    snapshot.slices = std::sync::Arc::default();
    assert_eq!(plan(&observed, &World::of(&[]).decide(&snapshot), CAPACITY), (Vec::new(), Vec::new()));

    // Everything is read, and the second service is gone.
    let (steps, _) = plan(&observed, &World::of(&[one]).desired(), CAPACITY);
    assert!(steps.iter().any(|step| matches!(step, Op::RemoveFrontendV4(_))));
}

/// The steps for the frontends of a service with two pods, as its exposure changes from call to call.
fn exposing() -> impl FnMut(bool, &[&'static str]) -> String {
    let mut observed = Observed::default();
    let pods: &[_] = &[(1, Ready, true), (2, Ready, true)];
    bring(&mut observed, &World::of(&[pods]));
    move |is_local, ranges| {
        let steps = bring(&mut observed, &World::of(&[pods]).exposed(is_local, ranges));
        let of_frontends = |step: &String| !step.starts_with("name") && !step.starts_with("put member");
        steps.into_iter().filter(of_frontends).collect::<Vec<_>>().join("\n")
    }
}

/// Between any two of these steps, no client without permission is admitted, and no client with permission is kept out.
#[test]
fn policies_and_ranges_are_set_while_a_service_lives() {
    let mut expose = exposing();
    insta::assert_snapshot!(expose(false, &["192.0.2.0/24"]), @r"
    put range of a service of 24
    put range of pods of 30
    put range of pods of 126
    set 3 bits Dnat
    put frontend :80 external slots 0+2 masqueraded
    put frontend :81 external slots 2+2 masqueraded
    put frontend :80 slots 0+2 split-scope
    put frontend :81 slots 2+2 split-scope
    put frontend :30080 slots 0+2 masqueraded
    put frontend :80 slots 0+2 masqueraded in ranges
    put frontend :81 slots 2+2 masqueraded in ranges
    grace
    ");
    insta::assert_snapshot!(expose(true, &["192.0.2.0/24", "198.51.100.0/24"]), @r"
    put range of a service of 24
    set 4 bits RevDnat
    put frontend :80 slots 0+2 shared split-scope
    put frontend :80 external slots 0+2 shared masqueraded
    put frontend :81 slots 2+2 shared split-scope
    put frontend :81 external slots 2+2 shared masqueraded
    put frontend :30080 slots 0+2 shared masqueraded
    put frontend :80 slots 0+2 shared masqueraded in ranges
    put frontend :81 slots 2+2 shared masqueraded in ranges
    write slots 4: [1]
    write slots 5: [1]
    put frontend :80 external slots 4+1 shared masqueraded
    put frontend :81 external slots 5+1 shared masqueraded
    put frontend :30080 external slots 4+1 shared
    put frontend :80 external slots 4+1 shared in ranges
    put frontend :81 external slots 5+1 shared in ranges
    put frontend :80 slots 4+1 shared split-scope
    put frontend :81 slots 5+1 shared split-scope
    put frontend :30080 slots 0+2 shared split-scope
    put frontend :80 slots 0+2 shared split-scope in ranges
    put frontend :81 slots 2+2 shared split-scope in ranges
    grace
    ");
}

#[test]
fn policies_and_ranges_are_taken_back_while_a_service_lives() {
    let mut expose = exposing();
    expose(true, &["192.0.2.0/24", "198.51.100.0/24"]);
    insta::assert_snapshot!(expose(true, &[]), @r"
    put frontend :80 external slots 4+1 shared
    put frontend :81 external slots 5+1 shared
    put frontend :80 slots 0+2 shared split-scope
    put frontend :81 slots 2+2 shared split-scope
    grace
    remove range of a service of 24
    remove range of a service of 24
    ");
    insta::assert_snapshot!(expose(false, &[]), @r"
    put frontend :80 external slots 0+2 masqueraded
    put frontend :81 external slots 2+2 masqueraded
    put frontend :80 slots 0+2 split-scope
    put frontend :81 slots 2+2 split-scope
    put frontend :30080 slots 0+2 masqueraded
    put frontend :80 slots 0+2 masqueraded
    put frontend :81 slots 2+2 masqueraded
    grace
    remove frontend :30080 external
    remove frontend :80 external
    remove frontend :81 external
    grace
    remove member 0
    remove member 1
    remove member 0
    remove member 1
    remove member 0
    remove member 1
    ");
}

#[test]
fn ranges_that_do_not_fit_are_counted_and_follow_when_there_is_room() {
    // One range is the node's address.
    let few = Capacity { ranges: 4, ..CAPACITY };
    let mut observed = Observed::default();
    let mut take = |ranges: &[&'static str]| {
        let world = World::of(&[&[(1, Ready, true)]]).exposed(false, ranges);
        let (steps, problems) = plan(&observed, &world.desired(), few);
        steps.iter().for_each(|step| observed.apply(step));
        let problems: Vec<String> = problems.iter().map(Problem::to_string).collect();
        (observed.ranges_v4.len(), problems.join("\n"))
    };
    assert_eq!(take(&["192.0.2.0/30"]), (3, String::new()));
    let (count, problems) = take(&["192.0.2.0/30", "192.0.2.4/30", "192.0.2.8/30"]);
    assert_eq!(count, 4);
    insta::assert_snapshot!(problems, @"Service default/s1: ranges table full (4): 1 source ranges of the service are ignored, clients in them are dropped");
    // The old ranges are removed at the end of a plan: the next plan can use their space.
    assert_eq!(take(&["192.0.2.16/30"]).0, 2);
    assert_eq!(take(&["192.0.2.16/30"]), (3, String::new()));
}

/// A service that is given back to another proxy leaves its connections here: they need their pods, and its slices still say
/// whether these are alive.
#[test]
fn pods_of_a_service_that_is_given_back_linger() {
    let mut observed = Observed::default();
    bring(&mut observed, &World::of(&[&[(1, Ready, true), (2, Ready, true)]]));
    let in_use = |observed: &Observed| observed.backends.values().filter(|backend| backend.generation % 2 == 1).count();
    let names = observed.names.clone();

    let options = Options { services: Services::Labelled, ..Options::default() };
    let given_back = |pods: &[_]| desired(&World::of(&[pods]).snapshot(), &options).0;
    let mut take = |pods: &[_]| {
        let (steps, problems) = plan(&observed, &given_back(pods), CAPACITY);
        assert!(problems.is_empty(), "{problems:?}");
        steps.iter().for_each(|step| observed.apply(step));
        observed.clone()
    };
    let after = take(&[(1, Ready, true), (2, Ready, true)]);
    assert!(after.frontends_v4.is_empty() && after.members.is_empty());
    assert!(after.backends.values().all(|record| record.flags & BACKEND_LINGERING != 0));
    assert_eq!((in_use(&after), &after.names), (2, &names));
    let after = take(&[(1, Leaving, true), (2, Ready, true)]);
    assert_eq!(after.backends[&0].flags, BACKEND_LINGERING | BACKEND_TERMINATING);
    let after = take(&[(2, Ready, true)]);
    assert_eq!(in_use(&after), 1);
    // Pods that were never ours are not remembered.
    let after = take(&[(2, Ready, true), (3, Ready, true)]);
    assert_eq!(in_use(&after), 1);
}

#[test]
fn the_mode_of_the_node_is_on_every_frontend() {
    let mut observed = Observed::default();
    let world = World::of(&[&[(1, Ready, true)]]);
    bring(&mut observed, &world);
    let options = Options { services: Services::Affinity, shadow: true, ..Options::default() };
    let (steps, _) = plan(&observed, &desired(&world.snapshot(), &options).0, CAPACITY);
    steps.iter().for_each(|step| observed.apply(step));
    let flags: Vec<u8> = observed.frontends_v4.values().map(|frontend| frontend.flags).collect();
    assert_eq!(flags, [AFFINITY | COEXIST | SHADOW; 2]);
}

#[test]
fn what_does_not_fit_is_named_and_the_rest_goes_on() {
    let world = World::of(&[&[(1, Ready, true), (2, Ready, true)], &[(3, Ready, true)]]);
    let lines = |problems: Vec<Problem>| problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n");

    let few_slots = Capacity { backends: 64, slots: 5, ranges: 64 };
    let (steps, problems) = plan(&Observed::default(), &world.desired(), few_slots);
    insta::assert_snapshot!(lines(problems), @"Service default/s2: no room for 1 slots of default/s2:b/UDP/v4 (of 5 slots); it is not published; raise --max-slots");
    let mut observed = Observed::default();
    steps.iter().for_each(|step| observed.apply(step));
    assert_eq!(observed.frontends_v4.len(), 3);

    // No space: the pool that would change keeps what it has.
    let world = World::of(&[&[(1, Ready, true), (2, Ready, true)], &[(4, Ready, true)]]);
    let (steps, problems) = plan(&observed, &world.desired(), few_slots);
    insta::assert_snapshot!(lines(problems), @r"
    Service default/s2: no room for 1 slots of default/s2:a/TCP/v4 (of 5 slots); its former members stay in use; raise --max-slots
    Service default/s2: no room for 1 slots of default/s2:b/UDP/v4 (of 5 slots); it is not published; raise --max-slots
    ");
    insta::assert_snapshot!(steps.iter().map(tell).collect::<Vec<_>>().join("\n"), @r"
    name default/p4
    put usage
    set 1 bits RevDnat
    put backend 3 generation 1
    put member 3 port 8080 ready
    ");

    let few_backends = Capacity { backends: 2, slots: 64, ranges: 64 };
    let world = World::of(&[&[(1, Ready, true), (2, Ready, true)], &[(2, Ready, true), (3, Ready, true)]]);
    let (_, problems) = plan(&Observed::default(), &world.desired(), few_backends);
    insta::assert_snapshot!(lines(problems), @r"
    Service default/s2: 1 endpoints of default/s2:a/TCP/v4 are not used: all 2 backends are in use; raise --max-backends
    Service default/s2: 1 endpoints of default/s2:b/UDP/v4 are not used: all 2 backends are in use; raise --max-backends
    ");
}
