"""The tests: a folder for each package of muon_plugin; `tests.support` is what they share."""
