"""A gradient becomes an update: groups, rules, ZeRO layout, learning rate; torch only, no DeepSpeed, no model."""
