// Package clock is the time by which a gateway lives: one clock for messages, commands and sessions, which no jump of
// the machine's clock moves.
//
// # Two times
//
// The wall clock is the machine's, Unix ms. It is what people and clouds read, and it may be wrong: boxes without a
// battery for their clock begin in 1970 and jump when a time server is found. So every reading says whether the
// kernel vouches for it, and carries the machine's time since boot beside it, from which the wall time can be put right
// later (Correction).
//
// The service clock counts ms that go on, whatever the wall clock does; its times are called t. While the process
// runs they follow the monotonic clock, and the time that the machine slept. From one process to the next they go on by
// the machine's time since boot, which is exact; over a reboot by the wall clock, if it was known to be right before
// and is so again; else the reboot is a gap of unknown length: the clock goes on from where it was, and when the wall
// clock is right again what was missed is credited to the gap. Nothing expires by a clock that nobody vouches for; a
// machine that never learns the time only counts the time that it runs.
//
// What a gap lasted counts for what began before it and for nothing else. So instants are kept as the clock showed
// them, gaps stand beside them, and an age (Between) and a due time (Due) are computed from both.
package clock
