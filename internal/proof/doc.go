// Package proof is the one checker of what Holdfast promises. It knows no gateway: it holds what devices were promised (Fleet)
// against what arrived upstream (Cloud) and what the gateway itself says of it (Books), and Check gives the verdict:
//
//   - lost: a message was acknowledged to its device, did not arrive, and no announced gap can hold it;
//   - unexplained: a sequence is missing upstream and no gap names it; a message arrived that nobody sent; one arrived under
//     two ids although its device sent it once; an account does not add up, or says other than what was announced or arrived;
//   - out of order: a message arrived first after a later one of its device and stream, or has a lower sequence than an earlier one.
//
// Whoever breaks a gateway, a test with a process or `holdfast verify` on somebody's box, runs
//
//	f, err := proof.StartFleet(ctx, proof.FleetConfig{Broker: "mqtt://…", Devices: 20, Rate: 200, Seed: seed})
//	c := proof.NewCloud()            // feed each publish upstream to c.Take
//	…                                // break it, restart it, compare f.Floor() with the books after each start
//	err = f.Finish()                 // all is acknowledged
//	…                                // wait until the books say that nothing is pending
//	v := proof.Settle(ctx, 15*time.Second, f, c, books)
//
// Plan draws a schedule of faults from a seed: the same seed, the same schedule. Report is what a run tells.
package proof
