"""Device meshes, sharding, data-parallel groups and multi-process runs."""
