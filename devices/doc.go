// Package devices knows who may connect and what waits for them: a Registry of devices with their
// credentials, roles and presence, and a Queue of commands for each.
//
// # The contract
//
// A command's state is on stable storage before it shows anywhere: before the packet that it leads to
// leaves, before the API tells it, before the cloud is told. Every change of state is one atomic write
// of the row and, where the submitter wants to be told, of the event that goes upstream.
//
// A device is who authenticated, never what a topic or a payload says.
//
// # Locks
//
// Rows are handed to the Journal, which may wait for the store; the store's completing goroutine calls
// back when they are durable. So a lock that such a callback takes is never held while rows are handed
// in: a device's order lock makes its changes one after the other and is held over the hand-in, the
// queue's mu guards memory, is held shortly, and is the only one that a callback takes.
package devices
