"""Tables over the devices of a mesh: row layouts, all-to-all, gradients."""
