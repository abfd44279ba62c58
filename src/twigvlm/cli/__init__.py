"""The `twigvlm` command: one file per subcommand; options and help are made from the dataclasses."""
