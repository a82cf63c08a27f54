"""Collections of tables: stacking, input checks, lookups over a mesh."""
