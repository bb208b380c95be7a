"""The parser, configuration files, flags and device that commands share."""
