"""Full, linear and local attention as pure functions, a file each, and their registry."""
