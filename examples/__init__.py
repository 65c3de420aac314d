"""Programs to read and to run; the tests import the method from here, as the reference that the engine must equal."""
