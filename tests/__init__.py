"""The tests: a folder for each room of muon_plugin; `tests.support` is what they share."""
