//! The fuzz target: libFuzzer calls [`affinity_fuzz::examine`] with one input after another.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    affinity_fuzz::examine(input);
});
