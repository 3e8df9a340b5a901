"""The version, where every file may import it from."""

VERSION = "0.1.0.dev0"
