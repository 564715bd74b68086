"""The optimizer itself: no engine, no watchdog, no command. Engines import the core, the core imports none of them."""
