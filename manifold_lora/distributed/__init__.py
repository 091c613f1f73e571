"""Where arrays are on a mesh of devices, and what several processes agree on."""
