"""The record: ledger, versions, report, tracking. No torch."""
