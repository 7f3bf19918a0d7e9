package main

// figures in the order of the issue that set them; docs/benchmarks.md keeps their numbers.
var figures = []figure{
	{2, "The spool alone", measureStore},
}
