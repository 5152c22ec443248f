"""Recoveries that know a defence, and undo it first."""
