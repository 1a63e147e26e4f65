"""What `plan` needs: programs compiled for chips that are not there, and what they are measured against."""
