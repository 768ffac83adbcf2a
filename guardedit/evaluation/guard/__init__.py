"""The benchmark of the guard itself: does what is measured before an edit predict the damage after it?"""
