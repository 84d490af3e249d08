//! The `affinity` command.

fn main() -> impl std::process::Termination {
    affinity_user::cli::main()
}
