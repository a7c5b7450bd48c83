//! The allocator, the arguments, the exit code. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    framegate::cli::Cli::parse().run()
}
