//! Access to a family's tables in a model and in a [`State`], so that tests are written once for both families.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use affinity_common::{
    abi::{Address, Flow, FlowKey, Foreign, FragmentKey, Frontend, FrontendKey, RangeKey, Session, SessionKey, V4, V6},
    model::{Lru, Model},
};

use super::State;

/// An address family.
pub trait ModelFamily: Address {
    /// The address; `None` if it is of the other family.
    fn of(address: IpAddr) -> Option<Self>;
    /// The model's frontends.
    fn frontends(model: &Model) -> &BTreeMap<FrontendKey<Self>, Frontend>;
    /// The same, to be changed.
    fn frontends_mut(model: &mut Model) -> &mut BTreeMap<FrontendKey<Self>, Frontend>;
    /// The model's ranges of addresses.
    fn ranges(model: &Model) -> &BTreeSet<RangeKey<Self>>;
    /// The same, to be changed.
    fn ranges_mut(model: &mut Model) -> &mut BTreeSet<RangeKey<Self>>;
    /// The model's fragmented packets.
    fn fragments(model: &Model) -> &RefCell<Lru<FragmentKey<Self>, FlowKey<Self>>>;
    /// The model's sessions.
    fn sessions(model: &Model) -> &RefCell<Lru<SessionKey<Self>, Session>>;
    /// The model's flows.
    fn flows(model: &Model) -> &RefCell<Lru<FlowKey<Self>, Flow<Self>>>;
    /// The model's foreign connections.
    fn foreign(model: &Model) -> &RefCell<Lru<FlowKey<Self>, Foreign>>;
    /// The sessions after the frames.
    fn sessions_left(state: &State) -> &BTreeMap<SessionKey<Self>, Session>;
    /// The flows after the frames.
    fn flows_left(state: &State) -> &BTreeMap<FlowKey<Self>, Flow<Self>>;
}

macro_rules! family {
    ($address:ident, $frontends:ident, $ranges:ident, $sessions:ident, $flows:ident, $foreign:ident, $fragments:ident) => {
        impl ModelFamily for $address {
            fn of(address: IpAddr) -> Option<Self> {
                if let IpAddr::$address(address) = address { Some(Self(address.octets())) } else { None }
            }

            fn frontends(model: &Model) -> &BTreeMap<FrontendKey<Self>, Frontend> {
                &model.$frontends
            }

            fn frontends_mut(model: &mut Model) -> &mut BTreeMap<FrontendKey<Self>, Frontend> {
                &mut model.$frontends
            }

            fn ranges(model: &Model) -> &BTreeSet<RangeKey<Self>> {
                &model.$ranges
            }

            fn ranges_mut(model: &mut Model) -> &mut BTreeSet<RangeKey<Self>> {
                &mut model.$ranges
            }

            fn fragments(model: &Model) -> &RefCell<Lru<FragmentKey<Self>, FlowKey<Self>>> {
                &model.$fragments
            }

            fn sessions(model: &Model) -> &RefCell<Lru<SessionKey<Self>, Session>> {
                &model.$sessions
            }

            fn flows(model: &Model) -> &RefCell<Lru<FlowKey<Self>, Flow<Self>>> {
                &model.$flows
            }

            fn foreign(model: &Model) -> &RefCell<Lru<FlowKey<Self>, Foreign>> {
                &model.$foreign
            }

            fn sessions_left(state: &State) -> &BTreeMap<SessionKey<Self>, Session> {
                &state.$sessions
            }

            fn flows_left(state: &State) -> &BTreeMap<FlowKey<Self>, Flow<Self>> {
                &state.$flows
            }
        }
    };
}

family!(V4, frontends_v4, ranges_v4, sessions_v4, flows_v4, foreign_v4, fragments_v4);
family!(V6, frontends_v6, ranges_v6, sessions_v6, flows_v6, foreign_v6, fragments_v6);
