"""Option classes, one module per group; an option is found by its YAML's ``_target_``, there is no list to keep."""
