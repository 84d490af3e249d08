//! The stack of the kernel programs, counted as the verifier counts it.
//!
//! A program and all functions that it is in the middle of calling have [`STACK`] bytes together, in at most [`CALLS`]
//! frames. Linux before 6.9 rounds each frame up to [`FRAME`] bytes, and counts at least one. A global function is verified
//! by itself, but its frame counts in every chain of calls that leads to it: `check_max_stack_depth` follows all calls, and
//! never asks what kind of function it is in. Since some machines run 6.1, its rules are the ones that the programs keep:
//! <https://elixir.bootlin.com/linux/v6.1/A/ident/check_max_stack_depth>.
//!
//! What is counted here is what the code could use; the verifier counts what it sees used, which is no more.

use std::collections::{BTreeMap, BTreeSet};

use affinity_user::objects::PROGRAMS;
use aya_obj::{Object, generated::bpf_insn};

/// `MAX_BPF_STACK` of the kernel, in bytes.
const STACK: u32 = 512;
/// To this many bytes Linux before 6.9 rounds a frame up.
const FRAME: u32 = 32;
/// `MAX_CALL_FRAMES` of the kernel.
const CALLS: usize = 8;
/// What a function that ends in a tail call may have above it, in bytes: the frames of its callers stay where they are.
const ABOVE_TAIL_CALL: u32 = 256;

const FRAME_POINTER: u8 = 10;
const CLASS_LOAD: u8 = 0x01;
const CLASS_STORE_CONSTANT: u8 = 0x02;
const CLASS_STORE: u8 = 0x03;
/// `register += constant`.
const ADD_CONSTANT: u8 = 0x07;
/// `register = register`.
const MOVE: u8 = 0xbf;
const CALL: u8 = 0x85;
const TAIL_CALL: i32 = 12;
/// A call's source register: to a function of the program.
const TO_FUNCTION: u8 = 1;

/// One function of a linked program.
#[derive(Debug)]
struct Function {
    name: String,
    /// Bytes below the frame pointer, rounded up.
    frame: u32,
    /// Where the functions that it calls start.
    calls: BTreeSet<usize>,
    has_tail_call: bool,
}

/// The functions of one program by their first instruction; the program itself is at zero.
type Functions = BTreeMap<usize, Function>;

/// Every program, linked as the loader links it.
fn programs() -> BTreeMap<String, Functions> {
    let mut object = Object::parse(PROGRAMS).expect("the object that was built");
    let mut names = BTreeMap::new();
    for function in object.functions.values() {
        for info in &function.func_info.func_info {
            names.insert(info.type_id, function.name.clone());
        }
    }
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections).expect("calls between functions of the object");

    let functions_of = |name: &String, program: &aya_obj::Program| {
        let linked = &object.functions[&program.function_key()];
        let starts =
            linked.func_info.func_info.iter().map(|info| (info.insn_off as usize, names[&info.type_id].clone()));
        (name.clone(), functions(&linked.instructions, &starts.collect()))
    };
    object.programs.iter().map(|(name, program)| functions_of(name, program)).collect()
}

fn functions(instructions: &[bpf_insn], names: &BTreeMap<usize, String>) -> Functions {
    let mut starts = BTreeSet::from([0]);
    for (at, instruction) in instructions.iter().enumerate() {
        starts.extend(callee(at, instruction));
    }
    let ends = starts.iter().copied().skip(1).chain([instructions.len()]);
    let function = |(start, end): (usize, usize)| {
        let body = &instructions[start..end];
        let calls = body.iter().enumerate().filter_map(|(at, instruction)| callee(start + at, instruction));
        let has_tail_call = body
            .iter()
            .any(|instruction| instruction.code == CALL && instruction.src_reg() == 0 && instruction.imm == TAIL_CALL);
        let name = names.get(&start).cloned().unwrap_or_default();
        (start, Function { name, frame: frame(body), calls: calls.collect(), has_tail_call })
    };
    starts.iter().copied().zip(ends).map(function).collect()
}

/// Where the function starts that an instruction calls.
fn callee(at: usize, instruction: &bpf_insn) -> Option<usize> {
    let is_call = instruction.code == CALL && instruction.src_reg() == TO_FUNCTION;
    is_call.then(|| at.checked_add_signed(instruction.imm as isize + 1).expect("a function of the program"))
}

/// Bytes of a function's frame: as deep as it loads, stores, or makes a pointer to.
fn frame(body: &[bpf_insn]) -> u32 {
    let mut deepest = 1;
    let mut note = |offset: i32| deepest = deepest.max(offset.min(0).unsigned_abs());
    for (at, instruction) in body.iter().enumerate() {
        let base = match instruction.code & 0x07 {
            CLASS_LOAD => instruction.src_reg(),
            CLASS_STORE | CLASS_STORE_CONSTANT => instruction.dst_reg(),
            _ => 0,
        };
        if base == FRAME_POINTER {
            note(instruction.off.into());
        }
        if instruction.code == MOVE && instruction.src_reg() == FRAME_POINTER {
            // The compiler makes every pointer to the stack by these two.
            let next = &body[at + 1];
            assert_eq!((next.code, next.dst_reg()), (ADD_CONSTANT, instruction.dst_reg()), "a pointer to the stack");
            note(next.imm);
        }
    }
    deepest.next_multiple_of(FRAME)
}

/// The deepest chain of calls that begins in a function: the bytes, and the functions.
fn deepest(functions: &Functions, start: usize) -> (u32, Vec<usize>) {
    let function = &functions[&start];
    let (below, chain) = function.calls.iter().map(|&callee| deepest(functions, callee)).max().unwrap_or_default();
    (function.frame + below, [start].into_iter().chain(chain).collect())
}

/// The longest chain of calls that begins in a function, in frames.
fn longest(functions: &Functions, start: usize) -> usize {
    1 + functions[&start].calls.iter().map(|&callee| longest(functions, callee)).max().unwrap_or(0)
}

/// The most bytes that the callers of any function with a tail call have above it.
fn above_tail_calls(functions: &Functions, start: usize, above: u32) -> u32 {
    let function = &functions[&start];
    let here = if function.has_tail_call { above } else { 0 };
    let below = function.calls.iter().map(|&callee| above_tail_calls(functions, callee, above + function.frame));
    below.max().unwrap_or(0).max(here)
}

#[test]
fn every_chain_of_calls_fits_the_stack() {
    let programs = programs();
    assert!(programs.contains_key("xdp_forward") && programs.contains_key("connect6"), "{:?}", programs.keys());
    for (name, functions) in &programs {
        let (bytes, chain) = deepest(functions, 0);
        println!("{name}: {bytes} of {STACK} bytes");
        for function in chain.iter().map(|start| &functions[start]) {
            println!("    {:3} {}", function.frame, function.name);
        }
        assert!(bytes <= STACK, "{name}: a chain of calls needs {bytes} bytes: run this test with --nocapture");
        assert!(longest(functions, 0) <= CALLS, "{name}: more than {CALLS} frames");
        assert!(above_tail_calls(functions, 0, 0) < ABOVE_TAIL_CALL, "{name}: a tail call too deep");
    }
}

#[test]
fn frames_are_rounded_up_and_added() {
    let instruction = |code, (to, from), off, imm| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off,
        imm,
    };
    let store = |offset| instruction(0x7b, (FRAME_POINTER, 0), offset, 0);
    let call = |distance| instruction(CALL, (0, TO_FUNCTION), 0, distance);
    let exit = instruction(0x95, (0, 0), 0, 0);

    // The second function uses no stack, and has a frame nevertheless.
    let program = [store(-40), call(1), exit, call(1), exit, store(-96), exit];
    let functions = functions(&program, &BTreeMap::new());

    assert_eq!(functions.keys().copied().collect::<Vec<_>>(), [0, 3, 5]);
    assert_eq!(deepest(&functions, 0), (64 + 32 + 96, vec![0, 3, 5]));
    assert_eq!(longest(&functions, 0), 3);
}
