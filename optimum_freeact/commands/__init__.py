"""What each subcommand of `freeact` does; `optimum_freeact.cli` reads the command line and calls them."""
