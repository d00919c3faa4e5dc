"""The `folospec` command. It uses what every user can import, and nothing below it."""
