"""The demo's tenants, events and inbox scripts, and the checks that hold them against what arrived."""
