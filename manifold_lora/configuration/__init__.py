"""What the commands' configurations are made of, and how flags and TOML become them."""
