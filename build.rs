//! Tells the tests that there is a corpus to replay. Not in the package, no more than the corpus.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=corpus");
}
