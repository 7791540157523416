"""What several tests share: engines, made-up inputs, toys, and programs that tests start."""
