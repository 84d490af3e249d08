//! `affinity dump`: every map, or one, in canonical text.

use std::io::{self, BufWriter, Write};

use affinity_common::names;
use clap::{Args, builder::PossibleValuesParser};

use super::{
    Global,
    error::Error,
    node::NodeArgs,
    reading::Reading,
    source::{self, ClusterArgs, SourceName},
};
use crate::{
    attach::device_name,
    events::EventReader,
    store::{
        StoreError,
        kernel::{Family, KernelStore},
    },
    view::{Dump, DumpOptions},
};

/// Options of `affinity dump`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct DumpArgs {
    /// The map to print [default: all maps]
    #[arg(value_parser = PossibleValuesParser::new(names::MAPS))]
    map: Option<String>,
    /// Print the ages of sessions, flows and events, which differ between dumps
    #[arg(long)]
    times: bool,
    /// Print every slot of a pool instead of the number of slots of each pod
    #[arg(long)]
    slots: bool,
    /// Print what this YAML, or a cluster's API, would publish on an empty node, instead of the kernel's maps: needs no
    /// root
    #[arg(long, value_name = "PATH|kubernetes")]
    source: Option<SourceName>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    node: NodeArgs,
}

impl DumpArgs {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Error> {
        let options = DumpOptions { times: self.times, slots: self.slots };
        if let Some(source) = &self.source {
            let source = self.cluster.source(source, global)?;
            let catalog = source::catalog(&source::read(&source, self.node.facts_without_node(global)?)?)?;
            let dump = Dump::new(&catalog, options);
            return self.print(|map| Ok(dump.small(map).unwrap_or_default()));
        }
        let Reading { store, catalog } = Reading::open(&global.pin_dir)?;
        let dump = Dump::new(&catalog, options);
        self.print(|map| lines(&dump, &store, map))
    }

    fn print(&self, lines: impl Fn(&str) -> Result<Vec<String>, Error>) -> Result<(), Error> {
        let mut out = BufWriter::new(io::stdout().lock());
        let wanted = |map: &&str| self.map.as_ref().is_none_or(|wanted| wanted == map);
        for map in names::MAPS.into_iter().filter(wanted) {
            for line in lines(map)? {
                out.write_all(line.as_bytes())?;
                out.write_all(b"\n")?;
            }
        }
        Ok(out.flush()?)
    }
}

/// The lines of one map. For sorting, all of its entries must be in memory.
fn lines(dump: &Dump<'_>, store: &KernelStore, map: &str) -> Result<Vec<String>, Error> {
    if let Some(lines) = dump.small(map) {
        return Ok(lines);
    }
    Ok(match map {
        names::FILTER => {
            let words: Vec<_> = (0..store.filter.len()).map(|index| store.filter.load_u64(index)).collect();
            dump.filter(&words)
        }
        names::LOADS => {
            let loads: Vec<_> = (0..store.loads.len()).map(|index| store.loads.load_u64(index)).collect();
            dump.loads(&loads)
        }
        names::SESSIONS_V4 => sessions::<affinity_common::abi::V4>(dump, store)?,
        names::SESSIONS_V6 => sessions::<affinity_common::abi::V6>(dump, store)?,
        names::FLOWS_V4 => flows::<affinity_common::abi::V4>(dump, store)?,
        names::FLOWS_V6 => flows::<affinity_common::abi::V6>(dump, store)?,
        names::FOREIGN_V4 => foreign::<affinity_common::abi::V4>(dump, store)?,
        names::FOREIGN_V6 => foreign::<affinity_common::abi::V6>(dump, store)?,
        names::FRAGMENTS_V4 => fragments::<affinity_common::abi::V4>(dump, store)?,
        names::FRAGMENTS_V6 => fragments::<affinity_common::abi::V6>(dump, store)?,
        names::SNAT_PORT_CURSOR => dump.snat_port_cursor(store.snat_port_cursor.iter().collect::<Result<Vec<_>, _>>()?),
        names::DEVICES => dump.devices(store.devices.iter().collect::<Result<Vec<_>, _>>()?, device_name),
        names::SOCKETS => dump.sockets(store.sockets.iter().collect::<Result<Vec<_>, _>>()?),
        names::EVENTS => dump.events(&EventReader::from_oldest(&store.events)?.collect::<Vec<_>>()),
        names::STATUS => dump.status(),
        names::SERVICE_CONDITIONS => dump.service_conditions(),
        names::COUNTERS => dump.counters(&store.counter_sums()?),
        _ => Vec::new(),
    })
}

fn sessions<A: Family>(dump: &Dump<'_>, store: &KernelStore) -> Result<Vec<String>, StoreError> {
    let entries: Result<Vec<_>, _> = store.family::<A>().sessions.iter().collect();
    Ok(dump.sessions(entries?))
}

fn flows<A: Family>(dump: &Dump<'_>, store: &KernelStore) -> Result<Vec<String>, StoreError> {
    let entries: Result<Vec<_>, _> = store.family::<A>().flows.iter().collect();
    Ok(dump.flows(entries?))
}

fn foreign<A: Family>(dump: &Dump<'_>, store: &KernelStore) -> Result<Vec<String>, StoreError> {
    let entries: Result<Vec<_>, _> = store.family::<A>().foreign.iter().collect();
    Ok(dump.foreign(entries?))
}

fn fragments<A: Family>(dump: &Dump<'_>, store: &KernelStore) -> Result<Vec<String>, StoreError> {
    let entries: Result<Vec<_>, _> = store.family::<A>().fragments.iter().collect();
    Ok(dump.fragments(entries?))
}
