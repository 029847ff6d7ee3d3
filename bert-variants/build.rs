//! Tells the program which commit it was built from, where there is a git checkout.

use std::path::Path;
use std::process::Command;

/// Changes with every commit.
const LOG: &str = "../.git/logs/HEAD";

fn main() {
    if !Path::new(LOG).exists() {
        println!("cargo::rerun-if-changed=build.rs");
        return;
    }
    println!("cargo::rerun-if-changed={LOG}");
    let git = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    if let Ok(output) = git
        && output.status.success()
    {
        let commit = String::from_utf8_lossy(&output.stdout);
        println!("cargo::rustc-env=GIT_COMMIT={}", commit.trim());
    }
}
