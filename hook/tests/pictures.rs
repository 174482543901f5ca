//! The pictures of the map in docs/ are what the command prints. `make picture` draws them again.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use pinfold_lab::svg;

mod hosts;

/// Draws the pictures instead of comparing them.
const DRAW: &str = "PINFOLD_PICTURES";

#[test]
fn pictures_are_what_the_command_prints() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    for drawn in hosts::DRAWN {
        let Some(words) = drawn.picture else {
            continue;
        };
        let host = tempfile::tempdir().unwrap();
        drawn.make(host.path());
        let output = Command::new(env!("CARGO_BIN_EXE_hook"))
            .args(words.split(' '))
            .args(["--sysroot", "."])
            .env("CLICOLOR_FORCE", "1")
            .env_remove("NO_COLOR")
            .env("TERM", "xterm")
            .current_dir(host.path())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}: {text}", drawn.machine);
        let picture = svg::draw(&format!("hook {words}"), &text);
        let file = docs.join(format!("map-{}.svg", drawn.machine));
        if env::var_os(DRAW).is_some() {
            fs::write(&file, picture).unwrap();
            continue;
        }
        let found = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            found == picture,
            "{} is not what `hook {words}` prints; `make maps` draws it again:\n{text}",
            file.display()
        );
    }
}
