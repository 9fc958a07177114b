"""The process inside every workspace: owns the terminal and reports over one outgoing link."""
