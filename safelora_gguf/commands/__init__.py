"""The commands, a module each: parse, call one function, print its result. Heavy imports stand inside their bodies."""
