//! `bench packet` measures what its cases say: it fails by itself if the packets are not those of a case.

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Runs the benchmark once, for a few packets, and returns its rows by hook.
fn rows() -> Result<BTreeMap<String, Vec<Value>>> {
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["packet", "--rounds", "1", "--packets", "5000", "--families", "ipv4", "--json"])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout)?;
    let mut rows: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for row in document["cases"].as_array().context("no cases")? {
        rows.entry(row["hook"].as_str().context("no hook")?.to_owned()).or_default().push(row.clone());
    }
    Ok(rows)
}

fn reasons(rows: &[Value]) -> Vec<&str> {
    rows.iter().filter_map(|row| row["reason"].as_str()).collect()
}

#[test]
fn packet_bench_measures_each_path_without_the_waits_of_the_kernel() -> Result<()> {
    let rows = rows()?;
    let entering =
        ["not-frontend", "established", "established", "established", "pinned", "created", "returned"].as_slice();
    let leaving = ["not-reply", "reply", "reply", "reply", "masqueraded"].as_slice();
    assert_eq!(reasons(&rows["xdp"]), entering);
    assert_eq!(reasons(&rows["tc"]), [entering, leaving].concat());
    for row in rows.values().flatten() {
        // By this process's clock, a test run of XDP takes milliseconds more, which would be microseconds a packet here.
        let wrapper_ns = row["wrapper_ns"]["median"].as_f64().context("no figure")?;
        assert!(wrapper_ns < 2_000.0, "{row}");
    }
    Ok(())
}
