//! Parts of the pipeline that the kernel programs call as global functions, which the verifier checks once, however many calls
//! there are. Their arguments are a pointer and the tables, their result is a number.

use crate::{
    abi::{Address, FlowKey, Reason},
    headers::Headers,
    tables::FamilyTables,
};

/// The global functions of one family.
pub trait GlobalFunctions<A: Address>: FamilyTables<A> {
    /// [`crate::pipeline::open`].
    fn open_connection(&self, headers: &Headers<A>) -> Opened;
    /// [`crate::flow::note_change`].
    fn note_change(&self, headers: &Headers<A>);
    /// [`crate::foreign::note_leaving`].
    fn note_leaving(&self, headers: &Headers<A>);
    /// [`crate::snat::is_free`].
    fn is_free(&self, replies: &FlowKey<A>) -> bool;
}

/// The result of opening a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opened {
    /// It has a flow now.
    As(Reason),
    /// The packet does not belong to a frontend.
    NotOurs(Reason),
    /// The sender gets an RST or ICMP error.
    Rejected(Reason),
    /// The packet is dropped.
    Failed(Reason),
}

impl Opened {
    /// As a number: a global function returns one.
    #[inline(always)]
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        let (kind, reason) = match self {
            Self::As(reason) => (0, reason),
            Self::NotOurs(reason) => (1, reason),
            Self::Rejected(reason) => (2, reason),
            Self::Failed(reason) => (3, reason),
        };
        kind << 8 | reason as u64
    }

    /// The inverse of [`Opened::to_bits`].
    #[inline(always)]
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        let Some(reason) = Reason::from_byte(bits as u8) else { return Self::Failed(Reason::Inconsistent) };
        match bits >> 8 {
            0 => Self::As(reason),
            1 => Self::NotOurs(reason),
            2 => Self::Rejected(reason),
            _ => Self::Failed(reason),
        }
    }
}
