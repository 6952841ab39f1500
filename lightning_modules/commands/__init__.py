"""The `emmdit` command line: one file per subcommand."""
