//! `--source kubernetes`, with a test double of a cluster's API: whatever happens on the way, in the end the tables equal those
//! that files with the same objects produce.

mod agent;
mod cluster;
mod follower;
mod objects;

use std::sync::Arc;
use std::time::Duration;

use affinity_tests::apiserver::{Answer, ApiServer, Change, Gone, Kind, Request, Verb};
use affinity_tests::patience::patience;
use affinity_user::{
    source::{Notice, ObjectName, Snapshot},
    sys::monotonic_ns,
};
use anyhow::{Context, Result, ensure};
use serde_json::json;

use follower::{Follower, PATIENCE};
use objects::{cluster, node, service, slice};

/// Long enough to show that something does not come.
const A_WHILE: Duration = Duration::from_millis(400);

/// Waits for something at the double.
async fn eventually(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(patience(PATIENCE), wait).await.with_context(|| format!("in vain: {what}"))
}

/// Follows a cluster until everything is listed and watched.
async fn following(api: &ApiServer) -> Result<Follower> {
    let mut follower = Follower::of(api).await?;
    follower.settle(api).await?;
    watched(api).await?;
    Ok(follower)
}

async fn watched(api: &ApiServer) -> Result<()> {
    eventually("every kind is watched", || Kind::ALL.iter().all(|kind| api.watches(*kind) == 1)).await
}

fn requests(api: &ApiServer, kind: Kind, verb: Verb) -> Vec<Request> {
    api.requests().into_iter().filter(|request| request.kind == kind && request.verb == verb).collect()
}

#[tokio::test]
async fn a_list_comes_in_pages_and_as_one_snapshot() -> Result<()> {
    let api = cluster(0..1_100)?;
    let mut follower = Follower::of(&api).await?;
    let snapshot = follower.take().await?;
    assert_eq!((snapshot.services.len(), snapshot.slices.len()), (1_100, 1_100));
    assert_eq!(snapshot.node.context("this node")?.object.metadata.name.as_deref(), Some("node-a"));
    assert!(snapshot.problems.is_empty() && !snapshot.partial, "{:?}", snapshot.problems);
    assert_eq!(requests(&api, Kind::Services, Verb::List).len(), 3);
    follower.settle(&api).await
}

#[tokio::test]
async fn objects_come_change_and_go() -> Result<()> {
    let api = cluster(0..3)?;
    let mut follower = following(&api).await?;
    api.put(service(7))?;
    api.put(slice(7, 4))?;
    api.put(slice(0, 1))?;
    api.delete(Kind::Services, "shop", "web-1")?;
    api.delete(Kind::Slices, "shop", "web-1-abcde")?;
    follower.settle(&api).await?;
    // It makes no difference to the tables: it may go later than its service.
    while follower.last.slices.contains_key(&ObjectName::new("shop", "web-1-abcde")) {
        follower.take().await?;
    }
    let mut headless = service(8);
    headless["metadata"]["labels"] = json!({"service.kubernetes.io/headless": ""});
    api.put(headless)?;
    follower.quiet(A_WHILE).await
}

/// Takes snapshots until one has this many problems.
async fn with_problems(follower: &mut Follower, count: usize) -> Result<Snapshot> {
    loop {
        let snapshot = follower.take().await.with_context(|| format!("waiting for {count} problems"))?;
        if snapshot.problems.len() == count {
            return Ok(snapshot);
        }
    }
}

#[tokio::test]
async fn an_object_that_cannot_be_read_is_named_and_holds_nothing_up() -> Result<()> {
    let api = cluster(0..3)?;
    let mut service_of_ports = service(9);
    service_of_ports["spec"]["ports"] = json!("none");
    api.put(service_of_ports)?;
    let mut follower = Follower::of(&api).await?;
    let listed = follower.take().await?;
    let [problem] = listed.problems.as_slice() else { panic!("one problem, not {:?}", listed.problems) };
    assert!(problem.to_string().starts_with("Service shop/web-9: spec.ports: invalid type"), "{problem}");
    assert_eq!((listed.services.len(), listed.slices.len()), (3, 3));
    watched(&api).await?;

    let mut slice_of_ports = slice(1, 2);
    slice_of_ports["ports"][0]["port"] = json!("http");
    api.put(slice_of_ports)?;
    api.put(slice(0, 4))?;
    let after = with_problems(&mut follower, 2).await?;
    let endpoints = |snapshot: &Snapshot, number| {
        let name = ObjectName::new("shop", &format!("web-{number}-abcde"));
        snapshot.slices[&name].object.endpoints.as_ref().map(Vec::len)
    };
    assert_eq!(endpoints(&after, 1), Some(2), "it stays as it was");
    let mut last = after;
    while endpoints(&last, 0) != Some(4) {
        last = follower.take().await?;
    }

    api.delete(Kind::Services, "shop", "web-9")?;
    with_problems(&mut follower, 1).await?;
    api.put(slice(1, 3))?;
    with_problems(&mut follower, 0).await?;
    follower.settle(&api).await?;
    watched(&api).await?;
    for kind in Kind::ALL {
        ensure!(requests(&api, kind, Verb::List).len() == 1, "{kind:?} were listed again");
        ensure!(requests(&api, kind, Verb::Watch).len() == 1, "{kind:?} were watched again");
    }
    Ok(())
}

#[tokio::test]
async fn what_did_not_change_is_the_same_allocation() -> Result<()> {
    let api = cluster(0..2)?;
    let mut follower = Follower::of(&api).await?;
    let before = follower.take().await?;
    watched(&api).await?;
    api.put(slice(0, 3))?;
    let after = follower.take().await?;
    let name = |number| ObjectName::new("shop", &format!("web-{number}-abcde"));
    assert!(!Arc::ptr_eq(&before.slices[&name(0)].object, &after.slices[&name(0)].object));
    assert!(Arc::ptr_eq(&before.slices[&name(1)].object, &after.slices[&name(1)].object));
    // A change that does not matter: the time and the author of the last change.
    let mut touched = slice(1, 2);
    touched["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": "later"});
    api.put(touched.clone())?;
    follower.quiet(A_WHILE).await?;
    // A list that is read again and repeats the old contents has no effect.
    api.end_watches(Kind::Slices);
    api.put(touched)?;
    api.compact(Gone::Http);
    eventually("slices are listed again", || requests(&api, Kind::Slices, Verb::List).len() == 2).await?;
    follower.quiet(A_WHILE).await
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_from_its_last_bookmark() -> Result<()> {
    let api = cluster(0..3)?;
    let mut follower = following(&api).await?;
    api.put(slice(0, 1))?;
    follower.settle(&api).await?;
    Kind::ALL.iter().for_each(|kind| api.bookmark(*kind));
    let version = api.version().to_string();
    for round in 1..4u8 {
        Kind::ALL.iter().for_each(|kind| api.end_watches(*kind));
        // Changes meanwhile are reported afterwards.
        api.put(slice(1, 2 + round))?;
        api.delete(Kind::Services, "shop", &format!("web-{}", round - 1))?;
        follower.settle(&api).await?;
        watched(&api).await?;
    }
    for kind in Kind::ALL {
        ensure!(requests(&api, kind, Verb::List).len() == 1, "{kind:?} were listed again");
        ensure!(requests(&api, kind, Verb::Watch)[1].query["resourceVersion"] == version, "{kind:?}: not from there");
    }
    Ok(())
}

#[tokio::test]
async fn a_version_that_is_gone_is_listed_anew() -> Result<()> {
    for gone in [Gone::Http, Gone::Event] {
        let api = cluster(0..6)?;
        let mut follower = following(&api).await?;
        let before = follower.dump()?;
        // Everything is forgotten before any watch sees it, and the new lists take their time.
        api.misbehave(Kind::Services, Verb::List, [Answer::Late(A_WHILE)]);
        api.misbehave(Kind::Slices, Verb::List, [Answer::Status(500), Answer::Late(A_WHILE)]);
        Kind::ALL.iter().for_each(|kind| api.end_watches(*kind));
        api.delete(Kind::Services, "shop", "web-0")?;
        api.delete(Kind::Slices, "shop", "web-0-abcde")?;
        api.put(service(9))?;
        api.put(slice(9, 3))?;
        api.compact(gone);
        follower.quiet(A_WHILE / 2).await?;
        ensure!(follower.dump()? == before, "something was deleted while the lists were read");
        follower.settle(&api).await?;
        watched(&api).await?;
        api.put(slice(1, 5))?;
        follower.settle(&api).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_list_whose_pages_expire_is_begun_again() -> Result<()> {
    let api = cluster(0..1_200)?;
    api.misbehave(Kind::Services, Verb::List, [Answer::Late(Duration::ZERO), Answer::Status(410)]);
    let mut follower = Follower::of(&api).await?;
    follower.settle(&api).await?;
    // One page, the second refused, and then all three.
    assert_eq!(requests(&api, Kind::Services, Verb::List).len(), 5);
    assert_eq!(follower.snapshots, 1);
    Ok(())
}

#[tokio::test]
async fn a_connection_that_breaks_amid_an_event_loses_none() -> Result<()> {
    let api = cluster(0..3)?;
    let mut follower = following(&api).await?;
    for endpoints in 3..6 {
        api.put_and_break(slice(0, endpoints))?;
        follower.settle(&api).await?;
        watched(&api).await?;
    }
    assert_eq!(requests(&api, Kind::Slices, Verb::List).len(), 1);
    Ok(())
}

#[tokio::test]
async fn events_that_come_twice_or_late_change_nothing() -> Result<()> {
    let api = cluster(0..3)?;
    let mut follower = following(&api).await?;
    let overtaken = api.objects(Kind::Slices)[0].clone();
    api.put(slice(0, 4))?;
    api.put(slice(1, 4))?;
    let deleted = api.objects(Kind::Slices)[2].clone();
    api.delete(Kind::Slices, "shop", "web-2-abcde")?;
    follower.settle(&api).await?;
    let latest = api.objects(Kind::Slices)[0].clone();
    for (change, object) in [
        (Change::Modified, &latest),
        (Change::Modified, &overtaken),
        (Change::Deleted, &overtaken),
        (Change::Modified, &deleted),
        (Change::Added, &deleted),
        (Change::Modified, &latest),
    ] {
        api.send(Kind::Slices, change, object);
    }
    follower.quiet(A_WHILE).await?;
    // And new objects are still seen.
    api.put(slice(2, 1))?;
    follower.settle(&api).await
}

#[tokio::test]
async fn slow_lists_are_waited_for() -> Result<()> {
    let api = cluster(0..3)?;
    api.misbehave(Kind::Slices, Verb::List, [Answer::Late(2 * A_WHILE)]);
    let mut follower = Follower::of(&api).await?;
    follower.quiet(A_WHILE).await?;
    assert_eq!(follower.feed.view.current_ns(), None);
    follower.settle(&api).await?;
    assert_eq!(follower.snapshots, 1);
    Ok(())
}

#[tokio::test]
async fn errors_of_the_api_are_outlived() -> Result<()> {
    let api = cluster(0..3)?;
    for kind in Kind::ALL {
        api.misbehave(kind, Verb::List, [Answer::Status(500), Answer::Status(503)]);
        api.misbehave(kind, Verb::Watch, [Answer::Status(500), Answer::Status(502)]);
    }
    let mut follower = following(&api).await?;
    api.put(slice(0, 5))?;
    follower.settle(&api).await?;
    assert_eq!(requests(&api, Kind::Services, Verb::Watch).len(), 3);
    Ok(())
}

#[tokio::test]
async fn a_busy_api_is_given_the_time_that_it_asks_for() -> Result<()> {
    let api = cluster(0..3)?;
    api.misbehave(Kind::Slices, Verb::List, [Answer::TooManyRequests { retry_after_s: 2 }]);
    let mut follower = following(&api).await?;
    let lists = requests(&api, Kind::Slices, Verb::List);
    let waited = lists[1].at - lists[0].at;
    ensure!(lists.len() == 2 && waited >= Duration::from_secs(2), "{} lists, the second after {waited:?}", lists.len());
    follower.quiet(A_WHILE).await
}

#[tokio::test]
async fn an_api_that_is_away_at_the_start_is_waited_for() -> Result<()> {
    let mut api = cluster(0..3)?;
    api.vanish();
    let mut follower = Follower::of(&api).await?;
    follower.quiet(A_WHILE).await?;
    api.appear()?;
    follower.settle(&api).await
}

#[tokio::test]
async fn an_api_that_vanishes_takes_nothing_with_it() -> Result<()> {
    let mut api = cluster(0..3)?;
    let mut follower = following(&api).await?;
    let before = follower.dump()?;
    let current_ns = follower.feed.view.current_ns();
    api.vanish();
    api.put(service(7))?;
    api.put(slice(7, 2))?;
    api.delete(Kind::Services, "shop", "web-1")?;
    follower.quiet(2 * A_WHILE).await?;
    ensure!(follower.dump()? == before, "the tables have changed");
    ensure!(follower.feed.view.current_ns() == current_ns, "nobody knows how old the view is");
    api.appear()?;
    follower.settle(&api).await?;
    assert_eq!(requests(&api, Kind::Services, Verb::List).len(), 1);
    Ok(())
}

#[tokio::test]
async fn the_view_is_as_old_as_its_oldest_part() -> Result<()> {
    let api = cluster(0..3)?;
    let mut follower = following(&api).await?;
    let listed_ns = follower.feed.view.current_ns().context("lists are complete")?;
    let now_ns = monotonic_ns();
    ensure!(listed_ns < now_ns);
    api.bookmark(Kind::Services);
    api.bookmark(Kind::Nodes);
    // An event after the bookmark shows that the bookmark has arrived.
    api.put(service(7))?;
    follower.settle(&api).await?;
    ensure!(follower.feed.view.current_ns().is_some_and(|current_ns| current_ns < now_ns), "slices told nothing");
    api.bookmark(Kind::Slices);
    let view = &follower.feed.view;
    eventually("all kinds told", || view.current_ns().is_some_and(|current_ns| current_ns >= now_ns)).await
}

#[tokio::test]
async fn a_node_that_may_not_be_read_is_done_without() -> Result<()> {
    let api = cluster(0..3)?;
    api.misbehave(Kind::Nodes, Verb::List, [Answer::Status(403)]);
    let mut follower = Follower::of(&api).await?;
    let snapshot = follower.take().await?;
    ensure!(snapshot.node.is_none() && snapshot.services.len() == 3);
    ensure!(snapshot.problems.iter().any(|problem| problem.message.contains("403")), "{:?}", snapshot.problems);
    Ok(())
}

#[tokio::test]
async fn a_node_of_another_name_is_named() -> Result<()> {
    let api = cluster(0..1)?;
    api.delete(Kind::Nodes, "", "node-a")?;
    let mut follower = Follower::of(&api).await?;
    let problems = follower.take().await?.problems;
    ensure!(problems.iter().any(|problem| problem.message.contains("--node-name")), "{problems:?}");
    watched(&api).await?;
    api.put(node())?;
    let snapshot = follower.take().await?;
    ensure!(snapshot.problems.is_empty() && snapshot.node.is_some(), "{:?}", snapshot.problems);
    Ok(())
}

#[tokio::test]
async fn a_notice_is_posted_once_by_all_nodes_together() -> Result<()> {
    let api = cluster(0..1)?;
    let nodes = [following(&api).await?, Follower::of(&api).await?];
    nodes.iter().for_each(|node| {
        for message in ["one thing", "another thing", "one thing"] {
            let notice = Notice {
                service: ObjectName::new("shop", "web-0"),
                reason: "Misconfigured",
                message: message.to_owned(),
            };
            assert!(node.feed.notices.as_ref().is_some_and(|notices| notices.send(notice)));
        }
    });
    eventually("six requests", || api.event_requests() == 6).await?;
    let events = api.events();
    let notes: Vec<_> = events.iter().filter_map(|event| event["note"].as_str()).collect();
    ensure!(notes.len() == 2 && notes.contains(&"one thing") && notes.contains(&"another thing"), "{notes:?}");
    let event = &events[0];
    ensure!(event["regarding"]["uid"] == "uid-0" && event["regarding"]["kind"] == "Service", "{event}");
    ensure!(event["type"] == "Warning" && event["metadata"]["namespace"] == "shop", "{event}");
    ensure!(["action", "reportingController", "reportingInstance", "eventTime"].iter().all(|f| event[f].is_string()));
    Ok(())
}

#[tokio::test]
async fn events_go_on_while_one_namespace_is_being_deleted() -> Result<()> {
    let api = cluster(0..1)?;
    api.terminate_namespace("shop");
    let node = following(&api).await?;
    for (namespace, message) in [("shop", "lost"), ("other", "posted"), ("shop", "lost too"), ("other", "posted too")] {
        let service = ObjectName::new(namespace, "web-0");
        let notice = Notice { service, reason: "Misconfigured", message: message.to_owned() };
        ensure!(node.feed.notices.as_ref().is_some_and(|notices| notices.send(notice)), "{message}");
    }
    eventually("the last one is posted", || api.events().len() == 2).await?;
    ensure!(api.event_requests() == 4, "one request for each");
    Ok(())
}

#[tokio::test]
async fn a_service_whose_conditions_have_null_times_is_read() -> Result<()> {
    let api = cluster(0..2)?;
    let with_null_time = |number| {
        let mut service = service(number);
        service["status"] = json!({"loadBalancer": {}, "conditions": [
            {"type": "LoadBalancerPortsError", "status": "True", "reason": "x", "message": "", "lastTransitionTime": null}]});
        service
    };
    api.put(with_null_time(1))?;
    let mut follower = following(&api).await?;
    ensure!(follower.last.problems.is_empty(), "{:?}", follower.last.problems);
    // In events as in lists, and the watch continues.
    api.put(with_null_time(7))?;
    api.put(slice(7, 2))?;
    follower.settle(&api).await?;
    ensure!(follower.last.problems.is_empty(), "{:?}", follower.last.problems);
    ensure!(requests(&api, Kind::Services, Verb::Watch).len() == 1, "the watch was begun again");
    Ok(())
}

#[tokio::test]
async fn changes_that_come_together_are_sent_together() -> Result<()> {
    let api = cluster(0..200)?;
    let mut follower = following(&api).await?;
    let before = follower.snapshots;
    for number in 0..200 {
        api.put(slice(number, 3))?;
    }
    follower.settle(&api).await?;
    let snapshots = follower.snapshots - before;
    ensure!(snapshots < 50, "{snapshots} snapshots for 200 changes");
    Ok(())
}
