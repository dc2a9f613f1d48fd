#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cluster::sim::fuzz::parked_message(data));
