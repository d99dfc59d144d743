"""Update methods, one file each; the folder is the registry (`lorakit.core.registry` reads it)."""
