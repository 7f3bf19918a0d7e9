// Package firmwaresim is a fleet of simulated devices that behave as firmware does: they
// boot, connect with full-jitter backoff, sample, keep what is not acknowledged in a bounded
// flash buffer, lose their link in several ways, crash, and send again.
//
// # What a device publishes
//
// Topic dt/{app}/{device}/{stream}, payload a JSON object that begins with
//
//	{"device":"sim-00001","stream":"vitals","n":17,"ts":1767225600000, …
//
// n counts 1, 2, 3 … for each device and stream, through reconnects and crashes: it is the
// number by which order and loss are checked end to end (ParsePayload, Arrivals). ts is the
// time of the sample, Unix ms. The measured values follow. With Config.Size the object is
// filled up with a waveform to exactly that many bytes.
//
// # What a device keeps
//
// A sample of QoS 1 or 2 goes to flash and leaves it when the server has acknowledged it
// (PUBACK, or PUBREC for QoS 2). When flash is full the oldest sample that was not sent
// makes room; it is counted as dropped on the device. A QoS 0 sample is sent at once or
// dropped. A lost link keeps RAM: after the reconnect, if the server still has the session,
// what was in flight is sent again in order with DUP and the same packet identifier, else as
// new. A crash loses RAM, which is packet identifiers and the state of QoS 2: everything in
// flash is sent as new, on a new session.
//
// # Commands
//
// With Config.Commands a device subscribes to cmd/{device}/req/#, at the beginning of each session,
// and gets commands on cmd/{device}/req/{id}/{name}. A command is in flash when its PUBACK leaves.
// They are worked on one after the other, in the order of their arrival, also while the link is
// down, and answered on cmd/{device}/res/{id}/{accepted|progress|succeeded|failed|rejected}. Answers
// are QoS 1, go before samples, never make room for them, and stay in flash until they are
// acknowledged; so an outcome outlives lost links and crashes. Progress is told only while the link is up.
//
// What is done with a command is a matter of its name (Behaviour, Execution). A device does each at
// most once. Flash keeps the last 256 ids with their outcomes: what comes again is answered from
// there and not done again. A crash in the middle leaves open whether the command had its effect, and
// the device says so: it failed, "interrupted by a restart". Only what may be done twice (Query) is
// begun again, and for a reboot the restart is the outcome. A command that had not begun still is.
//
// The CommandLedger holds which commands came how often and what became of them.
// CommandLedger.Verify finds what was executed twice or came out of order (by the member n of
// payloads), and holds the device's word against what the cloud or the API says.
//
// # What is checked
//
// The Ledger holds what was published and what acknowledged. Ledger.Verify compares it with
// what arrived: an acknowledged message that did not arrive is lost; for each device and
// stream the first arrivals must have rising n; and nothing may arrive that was never sent.
package firmwaresim
