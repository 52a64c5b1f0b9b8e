"""The command line: ``lifl`` and its subcommands."""
