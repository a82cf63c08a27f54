"""Collections of tables: stacking, input checks, lookups over a mesh.

Private: `jbag` exports the public names.
"""
