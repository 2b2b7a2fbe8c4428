"""What is promised about anybody's data: clipping, noise, accounting, ledger, audit."""
