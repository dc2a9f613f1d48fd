#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cluster::fuzzing::master_input(data));
