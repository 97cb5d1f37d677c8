"""The run: building it, stepping it, saving it, guarding it, ending it with a code that tells what happened."""
