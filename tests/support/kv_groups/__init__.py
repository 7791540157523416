"""The table of KV-cache groups in docs/kv-groups.md, from the functions of vLLM itself."""
