"""Many tables, pooled in few launches."""
